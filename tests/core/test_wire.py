from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlight.core.errors import MessageError
from fedlight.core.wire import (
    HEADER,
    CodeFormat,
    JointFormat,
    pack_integers,
    read_message,
    saturation,
    unpack_integers,
    write_message,
)

every_bits = [*range(2, 17), 32]
float_types = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


@pytest.mark.parametrize("bits", every_bits)
@given(data=st.data())
def test_integers_come_back_and_take_exactly_their_bits(bits: int, data: st.DataObject) -> None:
    limit = 2 ** (bits - 1) - 1
    code = data.draw(st.lists(st.integers(-limit, limit), max_size=40))
    format = CodeFormat(len(code), bits)
    payload = format.pack(torch.tensor(code, dtype=torch.int32))
    assert len(payload) == format.payload_bytes == math.ceil(len(code) * bits / 8)
    assert format.unpack(payload).tolist() == code and format.unpack(payload).dtype == torch.int32


@pytest.mark.parametrize("bits", every_bits)
def test_the_limits_themselves_fit_and_one_more_is_refused(bits: int) -> None:
    format = CodeFormat(3, bits)
    edge = torch.tensor([-format.limit, 0, format.limit])
    assert torch.equal(format.unpack(format.pack(edge)).long(), edge)
    for beyond in (format.limit + 1, -format.limit - 1):
        with pytest.raises(MessageError, match=rf"within \+-{format.limit} \({bits} bits\) but the one at coordinate"):
            format.pack(torch.tensor([0, beyond, 0]))


@pytest.mark.parametrize("bits", every_bits)
def test_a_payload_with_the_unused_highest_pattern_is_refused(bits: int) -> None:
    length = 8
    with pytest.raises(MessageError, match=f"but the payload holds {2 ** (bits - 1)}"):
        CodeFormat(length, bits).unpack(b"\xff" * (length * bits // 8))


def test_floats_are_read_where_they_lie_if_that_can_be_written_to() -> None:
    format = CodeFormat(3)
    message = write_message(format.pack(torch.tensor([1.0, 2.0, 3.0])), format.kind, 3, 0, 0)
    for held, shared in ((message, True), (bytes(message), False)):
        code = format.unpack(read_message(held, format, 0, 0))
        place = np.frombuffer(held, np.uint8).ctypes.data + HEADER.size
        assert code.tolist() == [1.0, 2.0, 3.0] and (code.data_ptr() == place) == shared
    code.zero_()  # the copy of what cannot be written to
    assert bytes(message) == held


def test_floats_that_lie_askew_are_copied() -> None:
    format = JointFormat((CodeFormat(3, 3), CodeFormat(2, dtype=torch.float64)))
    message = write_message(format.pack(torch.tensor([1.0, -2.0, 3.0, 0.1, 1e300], dtype=torch.float64)), format.kind, 5, 0, 0)
    assert format.unpack(read_message(message, format, 0, 0)).tolist() == [1.0, -2.0, 3.0, 0.1, 1e300]
    askew = memoryview(message)[HEADER.size + 2 :]  # nine bits take two bytes
    assert format.parts[1].unpack(askew).data_ptr() % 8 == 0


@pytest.mark.parametrize("dtype", float_types)
@given(data=st.data())
def test_floats_come_back_bit_for_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    elements = st.floats(allow_nan=False, allow_infinity=False, width=dtype.itemsize * 8)
    code = torch.from_numpy(data.draw(hnp.arrays(float_types[dtype], st.integers(0, 20), elements=elements)))
    format = CodeFormat(len(code), dtype=dtype)
    payload = format.pack(code)
    assert len(payload) == format.payload_bytes == len(code) * dtype.itemsize
    assert format.unpack(payload).dtype == dtype and format.unpack(payload).numpy().tobytes() == code.numpy().tobytes()


@pytest.mark.parametrize("dtype", float_types)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_are_refused_on_arrival(dtype: torch.dtype, bad: float) -> None:
    format = CodeFormat(2, dtype=dtype)
    with pytest.raises(MessageError, match="finite"):
        format.unpack(format.pack(torch.tensor([1.0, bad], dtype=dtype)))


@pytest.mark.parametrize("bits", range(2, 33))
def test_packing_is_little_endian_first_value_lowest(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    values = np.random.default_rng(bits).integers(-limit, limit + 1, 19)
    packed = pack_integers(values, bits)
    number = int.from_bytes(packed, "little")
    assert [(number >> (i * bits)) % 2**bits - limit for i in range(19)] == values.tolist()
    assert number >> (19 * bits) == 0 and unpack_integers(packed, bits, 19).tolist() == values.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_float_code_of_another_dtype_is_sent_in_the_formats(dtype: torch.dtype) -> None:
    format = CodeFormat(2)
    assert format.unpack(format.pack(torch.tensor([0.5, -2.0], dtype=dtype))).tolist() == [0.5, -2.0]


def test_a_float_code_is_not_silently_truncated_to_integers() -> None:
    with pytest.raises(MessageError, match="integer code for a format of 4 bits but got torch.float32"):
        CodeFormat(2, 4).pack(torch.tensor([0.9, 1.2]))


@pytest.mark.parametrize("bits", [-1, 1, 33])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(MessageError, match=f"`bits`.*{bits}"):
        CodeFormat(3, bits)


def test_an_impossible_dtype_is_refused() -> None:
    with pytest.raises(MessageError, match="`dtype`.*bfloat16"):
        CodeFormat(3, dtype=torch.bfloat16)


def test_kinds_are_distinct() -> None:
    kinds = [CodeFormat(1, bits).kind for bits in every_bits] + [CodeFormat(1, dtype=dtype).kind for dtype in float_types]
    assert len(set(kinds)) == len(kinds) and all(0 <= kind < 256 for kind in kinds)


@pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), ()])
def test_a_code_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MessageError, match=r"shape \[3\]"):
        CodeFormat(3).pack(torch.zeros(shape))


@given(st.integers(0, 2**31), st.integers(0, 2**32 - 1), st.binary(max_size=20))
def test_a_message_is_its_16_byte_header_and_its_payload(round: int, codec: int, payload: bytes) -> None:
    format = CodeFormat(5, 4)
    message = write_message(payload, format.kind, 5, round, codec)
    assert HEADER.size == 16 and len(message) == 16 + len(payload)
    assert bytes(read_message(message, format, round, codec)) == payload


MESSAGE = write_message(CodeFormat(5, 4).pack(torch.arange(5)), 4, 5, 7, 1234)


def test_any_flipped_bit_in_the_header_is_refused() -> None:
    for bit in range(128):
        broken = bytearray(MESSAGE)
        broken[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(MessageError, match="in the message header"):
            read_message(bytes(broken), CodeFormat(5, 4), 7, 1234)


def test_any_truncated_message_is_refused() -> None:
    format = CodeFormat(5, 4)
    for length in range(len(MESSAGE)):
        with pytest.raises(MessageError, match="bytes but got"):
            format.unpack(read_message(MESSAGE[:length], format, 7, 1234))


def test_an_oversized_message_is_refused() -> None:
    format = CodeFormat(5, 4)
    with pytest.raises(MessageError, match="payload of 3 bytes but got 4"):
        format.unpack(read_message(MESSAGE + b"\0", format, 7, 1234))


@pytest.mark.parametrize(
    ("format", "round", "codec", "message"),
    [
        (CodeFormat(5, 4), 8, 1234, "Expected round 8 in the message header but got 7"),
        (CodeFormat(5, 4), 7, 1235, "Expected codec fingerprint 1235"),
        (CodeFormat(5, 5), 7, 1234, "Expected format 5"),
        (CodeFormat(5), 7, 1234, "Expected format 64"),
        (CodeFormat(6, 4), 7, 1234, "Expected code length 6"),
    ],
)
def test_a_message_meant_for_something_else_is_refused(format: CodeFormat, round: int, codec: int, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        read_message(MESSAGE, format, round, codec)


def test_unpacking_nothing_gives_nothing() -> None:
    assert len(unpack_integers(b"", 7, 0)) == 0 and pack_integers(np.array([], dtype=np.int32), 7) == b""


def joint() -> JointFormat:
    return JointFormat((CodeFormat(5, 2), CodeFormat(3, 7), CodeFormat(4, 16)))


def test_joint_integers_come_back() -> None:
    format = joint()
    code = torch.cat([torch.tensor([-1, 0, 1, 1, -1]), torch.tensor([-63, 0, 63]), torch.tensor([-32767, 1, 2, 32767])])
    payload = format.pack(code)
    assert len(payload) == format.payload_bytes == 2 + 3 + 8
    assert format.length == 12 and format.bits == 16
    back = format.unpack(payload)
    assert back.dtype == torch.int32 and torch.equal(back, code.int())


def test_joint_values_and_indices_come_back_exactly() -> None:
    format = JointFormat((CodeFormat(3), CodeFormat(3, 25)))
    values, indices = torch.tensor([0.1, -2.5, 1e-30]), torch.tensor([0, 12_345_678, -16_777_215])
    back = format.unpack(format.pack(torch.cat([values.double(), indices.double()])))
    assert not format.bits and back.dtype == torch.float64
    assert torch.equal(back[:3].float(), values) and torch.equal(back[3:].long(), indices)


@pytest.mark.parametrize("payload", [b"", bytes(12), bytes(14)])
def test_a_joint_payload_of_another_length_is_refused(payload: bytes) -> None:
    with pytest.raises(MessageError, match="payload of 13 bytes"):
        joint().unpack(payload)


def test_a_joint_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MessageError, match=r"within \+-1 "):
        joint().pack(torch.full((12,), 2))
    with pytest.raises(MessageError, match="shape"):
        joint().pack(torch.zeros(11, dtype=torch.int32))
    with pytest.raises(MessageError, match="at least one part"):
        JointFormat(())


@given(data=st.data())
def test_saturation_is_the_share_of_entries_at_the_end_of_their_own_part(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 6)), min_size=1, max_size=4))
    code, ends = [], 0
    for bits, length in parts:
        limit = 2 ** (bits - 1) - 1
        entries = data.draw(st.lists(st.integers(-limit, limit), min_size=length, max_size=length))
        code += entries
        ends += sum(abs(entry) == limit for entry in entries)
    formats = tuple(CodeFormat(length, bits) for bits, length in parts)
    assert saturation(torch.tensor(code), JointFormat(formats)) == pytest.approx(ends / len(code))
    if len(formats) == 1:
        assert saturation(torch.tensor(code), formats[0]) == pytest.approx(ends / len(code))


def test_codes_of_floats_and_of_nothing_do_not_saturate() -> None:
    assert saturation(torch.full((3,), 1e30), CodeFormat(3)) == 0
    assert saturation(torch.zeros(0, dtype=torch.int32), CodeFormat(0, 4)) == 0
    assert saturation(torch.full((3,), 1e30), JointFormat((CodeFormat(2), CodeFormat(1, 4)))) == 0
