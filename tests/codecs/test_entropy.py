from __future__ import annotations

import math
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs import ChainCodec, EntropyCodec, TwoSidedCodec
from fedlight.codecs.entropy import measure_levels
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, State
from fedlight.core.entropy import TOP, EntropyFormat
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.export import encoder_file, load_decoder, load_encoder, save_codec
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER

LENGTH = 4000
LEVELS = EntropyFormat(np.random.default_rng(0).integers(TOP - 16, TOP + 1, LENGTH).astype(np.uint8).tobytes())


def laplacian(scale: float = 2.0, seed: int = 0, format: EntropyFormat = LEVELS) -> Tensor:
    """Integers whose deviations are those of the format's levels, ``scale`` steps at the highest."""
    deviations = scale * 2.0 ** ((np.frombuffer(format.levels, np.uint8).astype(float) - TOP) / 2)
    drawn = np.random.default_rng(seed).laplace(0, deviations / math.sqrt(2))
    return torch.from_numpy(np.clip(np.rint(drawn), -format.limit, format.limit).astype(np.int32))


def bank_of(dim: int = LENGTH, rounds: int = 8, clients: int = 5, decay: float = 1.0, seed: int = 0) -> UpdateBank:
    """Laplacian updates over directions of very unequal energy, in rounds that shrink."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rounds, clients, dim, generator=generator).clamp(1e-6, 1 - 1e-6)
    unit = (uniform - 0.5).sign() * torch.log1p(-2 * (uniform - 0.5).abs())
    return UpdateBank(unit * torch.logspace(0, -2, dim) * decay ** torch.arange(rounds)[:, None, None], Layout.vector(dim))


def fitted(bank: UpdateBank, ratio: float) -> EntropyCodec:
    codec = EntropyCodec(ratio)
    codec.fit(bank, lambda *_: {})
    return codec


def lengths_of(codec: Codec, bank: UpdateBank, state: State | None = None) -> list[list[int]]:
    """The lengths of each round's messages of one run."""
    state, sent = {} if state is None else state, []
    for number, updates in enumerate(bank):
        sent.append([])
        simulate_round(codec, updates, None, Context(round=number), state, None, lambda step, client, m: sent[-1].append(len(m)))
    return sent


# The format


@given(data=st.data())
def test_what_is_packed_is_unpacked_whatever_it_is(data: st.DataObject) -> None:
    """Also where models are as wrong as can be."""
    levels = data.draw(st.binary(max_size=60).map(lambda raw: bytes(byte % (TOP + 1) for byte in raw)))
    format = EntropyFormat(levels)
    small, any_size = st.integers(-2, 2), st.integers(-format.limit, format.limit)
    entries = data.draw(st.lists(small | any_size, min_size=len(levels), max_size=len(levels)))
    payload = format.pack(torch.tensor(entries, dtype=torch.int32))
    assert format.unpack(payload).tolist() == entries and len(payload) <= format.payload_bytes
    assert format.unpack(memoryview(bytearray(payload))).tolist() == entries  # as a message's payload comes


@given(scale=st.floats(-4, 12), seed=st.integers(0, 50))
@example(scale=-20.0, seed=0)
@example(scale=30.0, seed=0)
def test_long_codes_of_any_size_come_back(scale: float, seed: int) -> None:
    code = laplacian(2.0**scale, seed)
    read = LEVELS.unpack(LEVELS.pack(code))
    assert torch.equal(read, code) and read.dtype == torch.int32


@pytest.mark.parametrize("level", [0, 4, 8, 12, 20, 30, TOP])
def test_long_runs_of_a_level_come_back_with_what_is_far_too_large_for_it(level: int) -> None:
    """They are read piece by piece by a short table, which knows no large integers."""
    format = EntropyFormat(bytes([level]) * 20_000)
    code = laplacian(2.0 ** ((TOP - level) / 2), format=format)
    for places, value in ((slice(5_000, 5_001), format.limit), (slice(13_000, 19_000, 300), -100), (slice(0, 4), -format.limit)):
        code[places] = value
        assert torch.equal(format.unpack(format.pack(code)), code)


def test_the_bytes_are_those_of_earlier_versions() -> None:
    """Of levels whose chances round to whole parts on every machine: files and messages are read by other versions."""
    payloads = [LEVELS.pack(laplacian(scale)) for scale in (0.3, 1, 8, 1000)]
    assert [(len(payload), zlib.crc32(payload)) for payload in payloads] == [
        (34, 1610946740),
        (182, 831874926),
        (854, 1111702564),
        (3978, 4120180895),
    ]


@pytest.mark.parametrize("scale", [0.2, 0.5, 1, 2, 8, 30])
def test_a_payload_is_within_two_percent_of_its_information(scale: float) -> None:
    """Of what the models say, and of the true entropy of such integers."""
    codes = [laplacian(scale, seed) for seed in range(10)]
    real = sum(len(LEVELS.pack(code)) for code in codes)
    assert sum(map(LEVELS.ideal_bytes, codes)) <= real <= 1.02 * sum(map(LEVELS.ideal_bytes, codes)) + 4 * len(codes)
    assert real <= 1.02 * len(codes) * entropy(scale) / 8 + 6 * len(codes)


def entropy(scale: float) -> float:
    """Bits of ``LENGTH`` rounded Laplacian numbers of the levels' deviations, from their probabilities."""
    total = 0.0
    for level, count in zip(*np.unique(np.frombuffer(LEVELS.levels, np.uint8), return_counts=True), strict=True):
        decay = math.sqrt(2) / (scale * 2.0 ** ((int(level) - TOP) / 2))
        wholes = np.arange(1, 2000)
        chances = np.concatenate([[-np.expm1(-decay / 2)], np.repeat(np.exp(-decay * (wholes - 0.5)) * -np.expm1(-decay) / 2, 2)])
        chances = chances[chances > 1e-30]
        total -= count * float((chances * np.log2(chances)).sum())
    return total


def test_a_code_of_zeros_takes_next_to_nothing() -> None:
    assert len(LEVELS.pack(torch.zeros(LENGTH, dtype=torch.int32))) <= 6


def test_a_common_factor_costs_one_byte_whatever_a_client_s_size() -> None:
    """Half an octave more costs half a bit a coefficient and no more, for the models follow."""
    sizes = [len(LEVELS.pack(laplacian(2.0 ** (octave / 2)))) for octave in range(10, 18)]
    assert np.diff(sizes) == pytest.approx([LENGTH / 16] * 7, rel=0.2)


def test_cut_payloads_are_refused() -> None:
    payload = LEVELS.pack(laplacian())
    for length in [0, 1, 2, 5, 6, *range(9, len(payload), 41), len(payload) - 4, len(payload) - 1]:
        with pytest.raises(MessageError, match="Expected an entropy-coded payload"):
            LEVELS.unpack(payload[:length])


def test_longer_payloads_are_refused_before_they_are_decoded() -> None:
    payload = LEVELS.pack(laplacian())
    for more in (b"\0", bytes(4), b"\xff" * 4, bytes(LEVELS.payload_bytes), bytes(10**7)):
        with pytest.raises(MessageError, match=f"{LEVELS.payload_bytes} bytes at most" if len(more) != 4 else "nothing else"):
            LEVELS.unpack(payload + more)


def test_a_damaged_payload_is_found() -> None:
    """A byte that changed, at any place; bytes that changed places; words of something else."""
    payload, rng = LEVELS.pack(laplacian()), np.random.default_rng(0)
    for place in [*range(8), *range(8, len(payload), 23), *range(len(payload) - 8, len(payload))]:
        damaged = bytearray(payload)
        damaged[place] ^= int(rng.integers(1, 256))
        with pytest.raises(MessageError, match="Expected an entropy-coded payload"):
            LEVELS.unpack(bytes(damaged))
    for damaged in (payload[:2] + payload[6:10] + payload[2:6] + payload[10:], payload[:2] + rng.bytes(len(payload) - 2)):
        with pytest.raises(MessageError, match="Expected an entropy-coded payload"):
            LEVELS.unpack(damaged)


@given(raw=st.binary(max_size=400), length=st.integers(0, 200))
@example(raw=b"\0\0" + b"\xff" * 40, length=100)
@example(raw=b"\x4c\0" + bytes(400), length=7)
def test_any_bytes_are_refused_or_a_code(raw: bytes, length: int) -> None:
    format = EntropyFormat(LEVELS.levels[:length])
    try:
        code = format.unpack(raw)
    except MessageError:
        return
    assert code.shape == (length,) and int(code.abs().max() if length else 0) <= format.limit and format.pack(code) is not None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), r"shape \[4000\] but got \[3\]"),
        (torch.zeros(LENGTH), "integer code.*float32: round it first"),
        (torch.full((LENGTH,), -(2**31), dtype=torch.int32), "the one at coordinate 0 is larger"),
        (torch.full((LENGTH,), 4096), r"within \+-4095 but the one at coordinate 0 is larger"),
    ],
)
def test_codes_that_are_none_of_the_format_are_refused(code: Tensor, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        LEVELS.pack(code)


# The codec


@pytest.mark.parametrize("ratio", [8, 16, 24, 60])
def test_messages_have_the_mean_length_that_was_asked(ratio: float) -> None:
    """From the first round on, if it is like the bank's."""
    bank = bank_of(rounds=20)
    lengths = lengths_of(fitted(bank, ratio), bank)
    asked = 4 * LENGTH / ratio
    assert np.mean(lengths[0]) == pytest.approx(asked, rel=0.03)
    assert np.mean(lengths) == pytest.approx(asked, rel=0.01)
    assert len({length for round in lengths for length in round}) > 3  # each has its own


@pytest.mark.parametrize("first", [0.01, 0.1, 10, 100])
def test_the_step_finds_updates_that_are_of_another_size_than_the_bank_s(first: float) -> None:
    bank = bank_of(rounds=25)
    codec, run = fitted(bank, 20), UpdateBank(first * bank.updates, bank.layout)
    lengths = lengths_of(codec, run)
    assert abs(np.mean(lengths[0]) / 800 - 1) > 0.2
    assert np.mean(lengths[15:]) == pytest.approx(800, rel=0.02)


@pytest.mark.parametrize("decay", [0.8, 0.95, 1.05])
def test_the_step_follows_updates_that_shrink_or_grow(decay: float) -> None:
    bank = bank_of(rounds=20, decay=decay)
    state: State = {}
    lengths = lengths_of(fitted(bank, 20), bank, state)
    assert state["gain"] == pytest.approx(decay**19, rel=0.5)
    assert np.mean(lengths[5:]) == pytest.approx(800, rel=3 * abs(1 - decay))


def test_the_step_stays_a_number_whatever_lengths_are_recorded() -> None:
    decoder, state = fitted(bank_of(), 20).decoder, {}
    for mean_bytes, sign in ((17.0, -1), (1e9, 1)):
        gains = []
        for _ in range(400):
            decoder.record_lengths(mean_bytes, state)
            gains.append(decoder.broadcast(state)["gain"])
        assert all(sign * (b - a) >= 0 for a, b in pairwise(gains)) and 0 < gains[-1] < math.inf


def test_entries_below_six_tenths_of_a_step_become_zero() -> None:
    codec = fitted(bank_of(), 20)
    step = codec.encoder.step * 3.0
    relative = torch.tensor([0, 0.3, 0.59, 0.61, 1.59, 1.61, 7.59, 7.61, 1e9])
    update = torch.zeros(2, LENGTH)
    update[:, : len(relative)] = torch.stack([relative, -relative]) * step
    code = codec.encoder.encode(update, Context(broadcast={"gain": 3.0}), Private(torch.Generator()))
    expected = [0, 0, 0, 1, 1, 2, 7, 8, codec.encoder.format.limit]
    assert code[0, : len(relative)].tolist() == expected and torch.equal(code[1], -code[0])
    assert codec.encoder.common_step(Context(broadcast={"gain": 3.0})) == pytest.approx(float(step))


def test_more_bytes_make_fewer_errors() -> None:
    bank = bank_of()
    target = bank.updates.mean(1)
    errors = []
    for ratio in (100, 50, 25, 12, 6):
        codec, state = fitted(bank, ratio), {}
        decoded = torch.stack([simulate_round(codec, u, context=Context(round=i), server_state=state) for i, u in enumerate(bank)])
        errors.append(float((decoded - target).square().sum() / target.square().sum()))
    assert all(later < earlier for earlier, later in pairwise(errors)) and errors[-1] < 0.01


def test_levels_are_the_logarithms_of_deviations_whatever_the_rounds_sizes() -> None:
    updates = torch.tensor([8.0, -4.0, 1.0, 0.0]).expand(2, 3, 4) * torch.tensor([1.0, 1e-4])[:, None, None]
    assert measure_levels(UpdateBank(updates, Layout.vector(4))).tolist() == [TOP, TOP - 2, TOP - 6, 0]
    assert measure_levels(UpdateBank(torch.zeros(1, 1, 3), Layout.vector(3))).tolist() == [0, 0, 0]


def test_levels_take_less_than_half_a_byte_to_download() -> None:
    codec = fitted(bank_of(), 20)
    extra = len(encoder_file(codec)) - len(encoder_file(EntropyCodec(20).bind(Layout.vector(LENGTH))))
    assert extra < LENGTH / 2


def test_a_client_and_a_server_that_share_files_alone_understand_each_other(tmp_path: Path) -> None:
    layout = Layout(("a.weight", "a.bias", "b.weight"), ((30, 40), (30,), (16, 30)))
    updates = torch.randn(8, 5, layout.dim, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, layout.dim)
    codec = ChainCodec([TwoSidedCodec(2, encoder_share=2.0), EntropyCodec(8)])
    codec.fit(UpdateBank(updates, layout), lambda *_: {})
    save_codec(codec, tmp_path)
    encoder, decoder = load_encoder(tmp_path / "encoder.safetensors"), load_decoder(tmp_path / "decoder.safetensors")
    mine, theirs = {}, {}
    for number, cohort in enumerate(updates):
        context = Context(round=number, broadcast=decoder.broadcast(theirs))
        sent = [encoder.encode_message(update, context, Private(torch.Generator())) for update in cohort]
        decoded = decoder.decode_sum(sent, [1, 2, 3, 4, 5], context, theirs)
        assert torch.equal(decoded, simulate_round(codec, cohort, [1, 2, 3, 4, 5], context, mine))
    assert mine == theirs and mine["1"]["gain"] != 1
    damaged = bytearray(sent[0])
    damaged[HEADER.size + 5] ^= 1
    with pytest.raises(MessageError, match="entropy-coded payload"):
        decoder.read_message(damaged, context)


@pytest.mark.parametrize("ratio", [3.9, 0, -1])
def test_ratios_that_need_no_entropy_coder_are_refused(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match=f"`ratio` >= 4 but got {ratio}: for finer codes use QuantizeCodec"):
        EntropyCodec(ratio)


def test_messages_too_short_for_a_code_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at 20 one of 100 numbers has 20 bytes and 24 are the least: choose a smaller `ratio`"):
        EntropyCodec(20).bind(Layout.vector(100))
