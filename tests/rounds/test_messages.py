"""What crosses the wire is whole or refused, and weighs what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.model import Model
from fedlight.core.packing import pack, unpack
from fedlight.rounds.messages import LACKS, Download, Reply, ReplyFormat, Request

NUMBERS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


@given(VALUES)
def test_values_arrive_as_they_were(value: object) -> None:
    assert unpack(pack(value)) == value


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 100))
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    tensor = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    (arrived,) = unpack(pack([tensor]))
    assert arrived.dtype == dtype and arrived.shape == tensor.shape and torch.equal(arrived, tensor)


def test_what_is_no_plain_value_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="another type: .*object"):
        pack({"gain": object()})


def test_a_tensor_that_claims_more_than_it_holds_takes_no_memory() -> None:
    import msgpack

    claim = msgpack.packb(msgpack.ExtType(1, msgpack.packb(["torch.float32", [1 << 40], b"1234"])))
    with pytest.raises(MessageError, match="got 4 bytes"):
        unpack(claim)


def model(dim: int = 5, buffers: int = 2) -> Model:
    return Model(torch.randn(dim, generator=torch.Generator().manual_seed(dim)), torch.arange(float(buffers)))


DOWNLOADS = {
    "nothing": Download(3),
    "model": Download(3, model=model(), encoders=((2, b"encoder"),), version=2),
    "sums": Download(7, since=5, sums=((1, b"one"), (2, b"other")), encoders=((2, b"file"),), decoders=((2, b""),), keep=True),
    "buffers": Download(1, buffers=torch.tensor([0.5, -1.0]), keep=True),
}


def request(download: Download | None = None, payload: bytes = b"") -> Request:
    context = Context(7, 3, 1, 0, {"gain": 0.5, "algorithm": {"control": torch.arange(3.0)}})
    return Request(12, "train", context, download, payload, settled=(2, 0))


@pytest.mark.parametrize("name", [None, *DOWNLOADS])
@pytest.mark.parametrize("payload", [b"", b"keys of the others"])
def test_a_request_arrives_as_it_was_and_weighs_its_bytes(name: str | None, payload: bytes) -> None:
    sent = request(DOWNLOADS[name] if name else None, payload)
    data = sent.to_bytes()
    assert sent.nbytes == len(data)
    arrived = Request.parse(12, data)
    assert (arrived.client, arrived.stage, arrived.payload, arrived.settled) == (12, "train", payload, (2, 0))
    assert arrived.to_bytes() == data  # downloads, context and all
    assert arrived.context.key == (3, 1) and torch.equal(arrived.context.broadcast["algorithm"]["control"], torch.arange(3.0))
    if name is None:
        assert arrived.download is None
        return
    assert sent.download is not None and arrived.download is not None
    assert sent.download.nbytes == len(sent.download.to_bytes())
    assert sent.download.codec_bytes == sum(len(part) for files in (sent.download.encoders, sent.download.decoders) for _, part in files)
    if sent.download.model is not None:
        assert arrived.download.model is not None and torch.equal(arrived.download.model.weights, sent.download.model.weights)


def test_the_servers_own_model_never_travels() -> None:
    """A client in the server's process is handed the model; in bytes it is not there (law 9)."""
    secret = model(1000)
    kept = Download(3, since=3, keep=True, result=secret)
    assert kept.nbytes < 100 and Download.parse(kept.to_bytes()).result is None


@given(st.data())
def test_a_damaged_request_is_refused_or_another_request(data: st.DataObject) -> None:
    whole = bytearray(request(DOWNLOADS["sums"], b"payload").to_bytes())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert isinstance(Request.parse(12, bytes(whole)), Request)
    except MessageError:
        return


@pytest.mark.parametrize("weight", [None, 1, 4_000_000_000])
@pytest.mark.parametrize("inside", [None, True, False])
@pytest.mark.parametrize("buffers", [0, 3])
def test_a_reply_arrives_as_it_was_and_weighs_its_bytes(weight: int | None, inside: bool | None, buffers: int) -> None:
    sent = Reply(12, "train", b"code", weight, torch.arange(float(buffers)), inside)
    data = sent.to_bytes()
    assert sent.nbytes == len(data) == 4 + 4 * buffers + (0 if weight is None else 4) + (0 if inside is None else 1)
    arrived = ReplyFormat(buffers, weight is not None, inside is not None).parse(Request(12, "train", Context(round=2)), data)
    assert (bytes(arrived.payload), arrived.weight, arrived.inside) == (b"code", weight, inside)
    assert torch.equal(arrived.buffers, sent.buffers) and arrived.simulation is None
    assert (arrived.client, arrived.stage, arrived.key) == (12, "train", (2, 0))


@pytest.mark.parametrize("data", [b"", LACKS])
def test_an_empty_reply_and_one_of_a_client_that_lacks_something_have_nothing_beside(data: bytes) -> None:
    assert ReplyFormat(3, True, True).parse(Request(1, "train", Context()), data).payload == data


def test_a_reply_that_is_too_short_is_refused() -> None:
    with pytest.raises(MessageError, match="more than 17 bytes but got 12"):
        ReplyFormat(3, True, True).parse(Request(1, "train", Context()), b"0123456789ab")
    with pytest.raises(MessageError, match="clipping bit of 0 or 1 but got 7"):
        ReplyFormat(0, False, True).parse(Request(1, "train", Context()), b"code\x07")


def test_a_model_is_four_bytes_a_number() -> None:
    made = model(5, 2)
    assert made.data == np.concatenate([made.weights.numpy(), made.buffers.numpy()]).astype("<f4").tobytes()
    with pytest.raises(MessageError, match="a model of 9 weights"):
        Model.parse(made.data, 9)
