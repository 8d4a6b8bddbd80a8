from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.codecs import AutoencoderCodec, ChainCodec, IdentityCodec, LinearCodec, QuantizeCodec, TransformCodec
from fedlight.core.codec import Context
from fedlight.core.errors import MessageError
from fedlight.core.running_sum import RunningSum
from fedlight.rounds.sums import HEADER, apply_sum, read_sum, write_sum
from tests.federation import FederatedCallback, federated, federated_data, mlp, run, weights_of

CODEC = 12345


def running(total: torch.Tensor, weight: int = 1) -> RunningSum:
    codes = RunningSum()
    codes.total, codes.weight, codes.count = total, weight, 1
    return codes


def write(total: torch.Tensor, weight: int = 1, broadcast: dict[str, Any] | None = None, lr: float = 1.0) -> bytes:
    return write_sum(running(total, weight), Context(round=7, broadcast=broadcast or {}), CODEC, lr)


def repacked(message: bytes, notes: bytes | None = None, payload: bytes | None = None, **header: int) -> bytes:
    """The message with other notes, another payload, or other fields of the header."""
    names = ("magic", "version", "integers", "round", "codec", "weight", "noted")
    fields = dict(zip(names, HEADER.unpack_from(message), strict=True))
    old = message[HEADER.size : HEADER.size + fields["noted"]]
    body = message[HEADER.size + fields["noted"] :]
    notes, payload = old if notes is None else notes, body if payload is None else payload
    fields |= {"noted": len(notes)} | header
    return HEADER.pack(*(fields[name] for name in names)) + notes + payload


integers = st.one_of(
    st.integers(-3, 3), st.integers(-130, 130), st.integers(-(2**31) + 1, 2**31 - 1), st.sampled_from([-127, -126, 126, 127, 128])
)


@given(sums=st.lists(integers, max_size=60), weight=st.integers(1, 2**32 - 1), lr=st.floats(0, 10))
def test_integer_sums_come_back_as_the_mean_that_the_server_has(sums: list[int], weight: int, lr: float) -> None:
    total = torch.tensor(sums, dtype=torch.int64)
    broadcast = {"1": {"gain": 0.1}}
    mean, heard, rate = read_sum(write(total, weight, broadcast, lr), len(sums), 7, CODEC)
    assert torch.equal(mean, running(total, weight).mean()) and mean.dtype == torch.float32
    assert heard == broadcast and rate == lr


@given(sums=st.lists(st.floats(-1e30, 1e30), max_size=30), weight=st.integers(1, 1000))
def test_float_sums_come_back_as_the_mean_that_the_server_has(sums: list[float], weight: int) -> None:
    total = torch.tensor(sums, dtype=torch.float64)
    mean, _, _ = read_sum(write(total, weight), len(sums), 7, CODEC)
    assert torch.equal(mean, running(total, weight).mean())


def test_a_sum_takes_about_its_entropy() -> None:
    """Three values with probabilities 1/4, 1/2, 1/4 are worth 1.5 bits each, 1.75 in a Huffman code with a word for its end."""
    generator = torch.Generator().manual_seed(0)
    total = torch.randint(0, 2, (20_000,), generator=generator) - torch.randint(0, 2, (20_000,), generator=generator)
    assert 1.5 * 20_000 / 8 <= len(write(total)) <= 1.75 * 20_000 / 8 + 100


@given(data=st.data())
def test_a_cut_message_is_refused(data: st.DataObject) -> None:
    whole = write(torch.tensor([3, -200, 70_000, 0, 1]), broadcast={"gain": 2.0})
    with pytest.raises(MessageError):
        read_sum(whole[: data.draw(st.integers(0, len(whole) - 1))], 5, 7, CODEC)


@given(position=st.integers(0, 200), byte=st.integers(0, 255), is_float=st.booleans())
def test_a_damaged_message_is_refused_or_says_something_finite(position: int, byte: int, is_float: bool) -> None:
    total = torch.tensor([3, -200, 70_000, 0, 1])
    message = bytearray(write(total.double() if is_float else total, broadcast={"gain": 2.0}))
    message[position % len(message)] = byte
    try:
        mean, broadcast, lr = read_sum(bytes(message), 5, 7, CODEC)
    except MessageError:
        return
    assert torch.isfinite(mean).all() and mean.shape == (5,) and np.isfinite(lr) and isinstance(broadcast, dict)


@given(noise=st.binary(max_size=80))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(MessageError):
        read_sum(noise, 5, 7, CODEC)
    with pytest.raises(MessageError):
        read_sum(repacked(write(torch.tensor([1, 2, 3, 4, 5])), notes=noise), 5, 7, CODEC)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"round": 8}, "Expected round 7"),
        ({"codec": 1}, f"Expected codec {CODEC}"),
        ({"magic": b"XX"}, "Expected magic"),
        ({"version": 2}, "Expected version"),
        ({"weight": 0}, "positive weight"),
        ({"integers": 2}, "of integers"),
    ],
)
def test_another_round_codec_or_kind_is_named(changes, named):
    with pytest.raises(MessageError, match=named):
        read_sum(repacked(write(torch.tensor([1, 2])), **changes), 2, 7, CODEC)


@pytest.mark.parametrize("length", [1, 3])
def test_another_code_length_is_refused(length):
    for total in (torch.tensor([1, 200]), torch.tensor([1.0, 2.0])):
        with pytest.raises(MessageError, match="Expected a (packed sum|mean) of"):
            read_sum(write(total), length, 7, CODEC)


def deflated(raw: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(raw) + coder.flush()


def test_a_bomb_ends_where_the_sum_does():
    bomb = deflated(bytes(50_000_000))
    assert len(bomb) < 100_000
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(MessageError, match="packed sum of 2 integers"):
        read_sum(repacked(write(torch.tensor([1, 2])), payload=bomb), 2, 7, CODEC)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("payload", [deflated(b"\1\2") + b"more", deflated(b"\1\2\3"), deflated(b"\1"), b"", deflated(b"\1\x7f\0\0")])
def test_anything_but_one_packed_sum_is_refused(payload):
    with pytest.raises(MessageError, match="packed sum"):
        read_sum(repacked(write(torch.tensor([1, 2])), payload=payload), 2, 7, CODEC)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_not_finite_are_refused(bad):
    payload = np.array([1.0, bad], "<f4").tobytes()
    with pytest.raises(MessageError, match="finite mean"):
        read_sum(repacked(write(torch.tensor([1.0, 2.0])), payload=payload), 2, 7, CODEC)


@pytest.mark.parametrize(
    "notes",
    [
        b"[]",
        b"1",
        b"{}",
        b"\xff",
        b'{"broadcast": {}}',
        b'{"broadcast": [1], "lr": 1}',
        b'{"broadcast": {"gain": "x"}, "lr": 1}',
        b'{"broadcast": {"gain": NaN}, "lr": 1}',
        b'{"broadcast": {"0": {"gain": [1]}}, "lr": 1}',
        b'{"broadcast": {}, "lr": Infinity}',
        b'{"broadcast": {}, "lr": true}',
        b'{"broadcast": {}, "lr": {}}',
        b'{"broadcast": {}, "lr": ' + b"9" * 400 + b"}",
        b"[" * 60_000,
        b'{"broadcast": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b', "lr": 1}',
    ],
)
def test_notes_that_are_no_finite_numbers_are_refused(notes):
    with pytest.raises(MessageError, match="Expected notes"):
        read_sum(repacked(write(torch.tensor([1, 2])), notes=notes), 2, 7, CODEC)


@pytest.mark.parametrize("beyond", [2**31, -(2**31), 2**62, -(2**63)])
def test_sums_that_do_not_fit_are_refused_when_written(beyond):
    with pytest.raises(MessageError, match="fit 32 bits"):
        write(torch.tensor([0, beyond]))
    with pytest.raises(MessageError, match=r"less than 2\*\*32"):
        write(torch.tensor([0, 1]), weight=2**32)


def test_announced_tensors_are_refused():
    with pytest.raises(MessageError, match="a broadcast of numbers"):
        write(torch.tensor([1]), broadcast={"reply": torch.zeros(2)})


def test_notes_are_json_that_says_what_was_announced():
    message = write(torch.tensor([1]), broadcast={"1": {"gain": 0.25}}, lr=0.5)
    noted = HEADER.unpack_from(message)[-1]
    assert json.loads(message[HEADER.size :][:noted]) == {"broadcast": {"1": {"gain": 0.25}}, "lr": 0.5}


# -- a real run, replayed -----------------------------------------------------------------------------------------------


class Record(FederatedCallback):
    """Writes every round's sum as the server would, with the learning rate of its step."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def on_train_start(self, trainer, pl_module):
        downlink, finished = pl_module.downlink, pl_module.downlink.finished

        def record(current, context, codes, lr, model):
            self.messages.append(write_sum(codes, context, current.codec.encoder.fingerprint, lr))
            finished(current, context, codes, lr, model)

        downlink.finished = record


CODECS = {
    "identity": IdentityCodec,
    "fresh projection": lambda: LinearCodec(4, "random", block_size=16, fresh=True),
    "learned integers": lambda: ChainCodec([AutoencoderCodec(ratio=2, block_size=16, width=4), QuantizeCodec(6)]),
    "transform": lambda: TransformCodec(2, encoder_share=2.0),
}


@pytest.mark.parametrize("weighting", ["equal", "samples"])
@pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
def test_a_client_that_applies_every_sum_ends_with_the_servers_model(make, weighting):
    """From the initial weights to the final ones, bit for bit, schedule included, with nothing but the decoder and the messages."""
    module = federated(
        mlp(hidden=12),
        codec=make(),
        weighting=weighting,
        server_optimizer=lambda params: torch.optim.SGD(params, lr=0.9),
        server_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7),
    )
    weights, record = weights_of(module), Record()
    start = weights.clone()
    run(module, 5, callbacks=[record], data=federated_data())
    assert len(record.messages) == 5
    for number, message in enumerate(record.messages):
        apply_sum(weights, message, module.codec.decoder, number)
    assert torch.equal(weights, weights_of(module)) and not torch.equal(weights, start)
    with pytest.raises(MessageError, match="Expected round 3"):
        apply_sum(weights, record.messages[2], module.codec.decoder, 3)
    other = make().bind(module.layout)
    if other.needs_fit:
        with pytest.raises(MessageError, match="Expected codec"):
            apply_sum(weights, record.messages[2], other.decoder, 2)
