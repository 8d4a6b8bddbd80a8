"""Every law of fedlight/core/codec.py, on every codec. A new codec is one more row in ``CODECS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs import AutoencoderCodec, ChainCodec, IdentityCodec, LinearCodec, QuantizeCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Private, Public, State, TrainCodec
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.export import (
    codec_from_config,
    codec_state,
    encoder_bytes,
    load_codec,
    load_decoder,
    load_encoder,
    restore_codec,
    save_codec,
)
from fedlight.core.layout import Layout
from fedlight.core.wire import HEADER

CODECS: dict[str, Callable[[], Codec]] = {
    "identity": IdentityCodec,
    "linear pca rows": lambda: LinearCodec(4, "pca", "rows", 16),
    "linear pca rows, small blocks": lambda: LinearCodec(3, "pca", "rows", 4, cohort=0),
    "linear pca flat": lambda: LinearCodec(4, "pca", "flat", 16),
    "linear pca flat, one block": lambda: LinearCodec(16, "pca", "flat", 0),
    "linear random rows": lambda: LinearCodec(4, "random", "rows", 16),
    "linear random flat": lambda: LinearCodec(4, "random", "flat", 16),
    "linear, no compression": lambda: LinearCodec(1, "pca", "rows", 16),
    "autoencoder linear": lambda: AutoencoderCodec(4, block_size=16, depth=0),
    "autoencoder linear, random start": lambda: AutoencoderCodec(4, block_size=16, activation="linear", start="random"),
    "autoencoder linear flat": lambda: AutoencoderCodec(4, "flat", 16, depth=0),
    "autoencoder skip": lambda: AutoencoderCodec(4, block_size=16, width=8),
    "autoencoder flat": lambda: AutoencoderCodec(4, "flat", 16, width=8),
    "autoencoder without skip": lambda: AutoencoderCodec(4, block_size=16, width=16, skip=False, start="random"),
    "autoencoder relu, bias, deep": lambda: AutoencoderCodec(4, block_size=16, depth=2, width=8, activation="relu", bias=True),
    "quantize 4": lambda: QuantizeCodec(4),
    "quantize 9": lambda: QuantizeCodec(9),
    "autoencoder and quantize": lambda: ChainCodec([AutoencoderCodec(4, block_size=16, width=8), QuantizeCodec(6)]),
    "linear and quantize": lambda: ChainCodec([LinearCodec(4, block_size=16), QuantizeCodec(3)]),
    "linear and linear": lambda: ChainCodec([LinearCodec(2, block_size=16), LinearCodec(2, "random", "flat", 8)]),
}

ROUNDING = [name for name, make in CODECS.items() if name.startswith("quantize") or name.endswith("quantize")]
LINEAR = [name for name, make in CODECS.items() if make().linear]
rounding = pytest.mark.parametrize("case", ROUNDING, indirect=True)
exact = pytest.mark.parametrize("case", [name for name in CODECS if name not in ROUNDING], indirect=True)
linear = pytest.mark.parametrize("case", LINEAR, indirect=True)


@dataclass
class Case:
    """A fitted codec with what the laws are tried on."""

    name: str
    codec: Codec
    fit: UpdateBank
    held: UpdateBank
    public: Public

    @property
    def rounds_codes(self) -> bool:
        """Whether the codec draws random numbers and sends integers."""
        return self.codec.encoder.format.bits > 0

    def encode(self, update: Tensor, seed: int = 0) -> Tensor:
        private = Private(torch.Generator().manual_seed(seed))
        return self.codec.encoder.encode(update, self.public, private).detach()

    def message(self, update: Tensor, seed: int = 0) -> bytes:
        return self.codec.encoder.encode_message(update, self.public, Private(torch.Generator().manual_seed(seed)))

    def decode(self, code: Tensor) -> Tensor:
        return self.codec.decoder.decode(code.float(), self.public, {}).detach()

    def cohort(self, round: int = 0) -> list[bytes]:
        return [self.message(update, i) for i, update in enumerate(self.held.updates[round])]


def public_of(codec: Codec, round: int = 3) -> Public:
    return Public(seed=1, round=round, announced=codec.decoder.announce({}))


@pytest.fixture(scope="module", params=CODECS)
def case(request: pytest.FixtureRequest, banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec) -> Case:
    codec = CODECS[request.param]()
    codec.fit(banks[0], adam)
    return Case(request.param, codec, *banks, public_of(codec))


def test_shapes(case: Case) -> None:
    codec, dim = case.codec, case.fit.layout.dim
    length = codec.encoder.code_dim
    assert codec.encoder.dim == codec.decoder.dim == dim and codec.encoder.format == codec.decoder.format
    for lead in ((), (3,), (2, 3)):
        code = case.encode(torch.randn(*lead, dim))
        assert code.shape == (*lead, length)
        decoded = case.decode(code)
        assert decoded.shape == (*lead, dim) and decoded.dtype == torch.float32


def test_a_code_is_no_longer_than_the_budget(case: Case) -> None:
    stages = case.codec.codecs if isinstance(case.codec, ChainCodec) else [case.codec]
    budget = case.codec.encoder.dim
    for stage in stages:
        budget = int(budget / getattr(stage, "ratio", 1))
    assert 1 <= case.codec.encoder.code_dim <= budget


def test_integers_come_from_integer_formats_alone(case: Case) -> None:
    code = case.encode(case.held.updates[0])
    assert code.dtype == (torch.int32 if case.rounds_codes else torch.float32)


@exact
def test_a_batch_is_encoded_like_its_members(case: Case) -> None:
    updates = case.held.updates[:2]
    single = torch.stack([case.encode(update) for update in updates.flatten(0, 1)])
    torch.testing.assert_close(case.encode(updates).flatten(0, 1), single, rtol=1e-4, atol=1e-6)


def test_a_code_depends_on_the_update_and_the_generator_alone(case: Case) -> None:
    a, b = case.held.updates[0, :2]
    first = case.encode(a, 5)
    case.encode(b, 6)
    torch.rand(3)
    assert torch.equal(case.encode(a, 5), first)
    assert torch.equal(case.encode(a, 6), first) != case.rounds_codes


def test_encoding_leaves_the_update_and_the_global_generator_alone(case: Case) -> None:
    update = case.held.updates[0, 0].clone()
    before = torch.get_rng_state()
    code = case.encode(update)
    kept = code.clone()
    case.decode(code)
    assert torch.equal(update, case.held.updates[0, 0]) and torch.equal(code, kept)
    assert torch.equal(torch.get_rng_state(), before)


@given(scale=st.floats(-12, 6), seed=st.integers(0, 100), sparse=st.booleans())
def test_finite_stays_finite(case: Case, scale: float, seed: int, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = torch.randn(case.fit.layout.dim, generator=generator) * 10.0**scale
    if sparse:
        update *= torch.rand(len(update), generator=generator) < 0.05
    code = case.encode(update)
    assert torch.isfinite(code).all() and torch.isfinite(case.decode(code)).all()
    assert len(case.message(update)) == HEADER.size + case.codec.encoder.format.payload_bytes


@linear
def test_zero_stays_zero_in_linear_codecs(case: Case) -> None:
    decoded = case.decode(case.encode(torch.zeros(case.fit.layout.dim)))
    assert not decoded.any()


@linear
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_linear_codecs_decode_the_mean_code_to_the_decoded_mean(case: Case, weights: list[int], seed: int) -> None:
    updates = torch.randn(len(weights), case.fit.layout.dim, generator=torch.Generator().manual_seed(seed))
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean_code = (shares[:, None] * case.encode(updates).double()).sum(0)
    mean = (shares[:, None] * updates.double()).sum(0).float()
    torch.testing.assert_close(case.decode(mean_code), case.decode(case.encode(mean)), rtol=1e-4, atol=1e-5)


def test_the_decoded_mean_approximates_the_mean_on_held_out_updates(case: Case) -> None:
    codes = case.encode(case.held.updates)
    decoded = case.decode(case.codec.decoder.open(codes).double().mean(-2))
    target = case.held.updates.mean(1)
    error = (decoded - target).square().sum() / target.square().sum()
    limit = {"identity": 1e-12, "linear, no compression": 1e-2, "quantize 9": 1e-3}
    assert error < limit.get(case.name, 0.9)


def test_reconstruct_is_encode_mean_decode(case: Case) -> None:
    state: State = {}
    public = Public(announced=case.codec.decoder.announce(state))
    codes = case.codec.encoder.encode(case.held.updates, public, Private(torch.Generator().manual_seed(4)))
    expected = case.codec.decoder.decode(codes.float().mean(1), replace(public, clients=case.held.clients), state)
    carried: State = {}
    assert torch.equal(case.codec.reconstruct(case.held.updates, carried, torch.Generator().manual_seed(4)), expected)
    assert carried == state


def test_a_message_has_exactly_the_predicted_length(case: Case) -> None:
    format = case.codec.encoder.format
    assert len(case.message(case.held.updates[0, 0])) == HEADER.size + format.payload_bytes


def test_a_message_carries_the_code_exactly(case: Case) -> None:
    update = case.held.updates[0, 0]
    assert torch.equal(case.codec.decoder.read_message(case.message(update), case.public), case.codec.decoder.open(case.encode(update)))


def test_a_message_of_another_round_or_codec_is_refused(case: Case) -> None:
    message = case.message(case.held.updates[0, 0])
    with pytest.raises(MessageError, match="Expected round 4"):
        case.codec.decoder.read_message(message, replace(case.public, round=4))
    other = CODECS[case.name]().bind(case.fit.layout)
    with pytest.raises(MessageError):
        other.decoder.read_message(message[: len(message) // 2], case.public)
    if case.codec.needs_fit:
        with pytest.raises(MessageError, match="Expected codec fingerprint|Expected code length"):
            other.decoder.read_message(message, case.public)


@pytest.mark.parametrize("weights", [[1] * 5, [3, 1, 40, 7, 2]])
def test_decode_sum_is_decode_of_the_mean(case: Case, weights: list[int]) -> None:
    codes = torch.stack([case.encode(update, i) for i, update in enumerate(case.held.updates[0])])
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    expected = case.decode((shares[:, None] * codes.double()).sum(0))
    decoded = case.codec.decoder.decode_sum(case.cohort(), weights, case.public, {})
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-7)
    assert not decoded.requires_grad


def test_decode_sum_refuses_nothing_and_weights_that_are_not_positive(case: Case) -> None:
    decoder, messages = case.codec.decoder, case.cohort()
    with pytest.raises(ConfigurationError, match="at least one message"):
        decoder.decode_sum([], [], case.public, {})
    with pytest.raises(ConfigurationError, match="`weights` >= 1 but got 0"):
        decoder.decode_sum(messages, [1, 1, 0, 1, 1], case.public, {})


def test_integer_sums_do_not_depend_on_the_order(case: Case) -> None:
    messages, weights = case.cohort(), [3, 1, 40, 7, 2]
    order = [4, 2, 0, 3, 1]
    first = case.codec.decoder.decode_sum(messages, weights, case.public, {})
    second = case.codec.decoder.decode_sum([messages[i] for i in order], [weights[i] for i in order], case.public, {})
    if case.rounds_codes:
        assert torch.equal(first, second)
    torch.testing.assert_close(first, second)


def test_the_halves_share_no_memory(case: Case) -> None:
    mine = {t.untyped_storage().data_ptr() for t in case.codec.encoder.state_dict().values()}
    theirs = {t.untyped_storage().data_ptr() for t in case.codec.decoder.state_dict().values()}
    assert not mine & theirs


def test_a_codec_describes_itself(case: Case) -> None:
    again = codec_from_config(case.codec.config())
    assert type(again) is type(case.codec) and again.config() == case.codec.config()
    for name in ("additive", "linear", "passes", "needs_fit"):
        assert getattr(again, name) == getattr(case.codec, name)
    assert not again.bound and not again.fitted and case.codec.bound and case.codec.fitted


def test_an_exported_codec_is_the_same_codec(case: Case, tmp_path: Path) -> None:
    save_codec(case.codec, tmp_path)
    again = load_codec(tmp_path)
    assert again.describe() == case.codec.describe() and again.encoder.fingerprint == case.codec.encoder.fingerprint
    for half in ("encoder", "decoder"):
        mine, theirs = getattr(case.codec, half).state_dict(), getattr(again, half).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_each_half_works_alone_from_its_own_file(case: Case, tmp_path: Path) -> None:
    save_codec(case.codec, tmp_path)
    assert encoder_bytes(case.codec) == (tmp_path / "encoder.safetensors").stat().st_size
    (tmp_path / "decoder.safetensors").rename(tmp_path / "elsewhere.safetensors")
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    (tmp_path / "encoder.safetensors").unlink()
    decoder = load_decoder(tmp_path / "elsewhere.safetensors")
    sent = [
        encoder.encode_message(update, case.public, Private(torch.Generator().manual_seed(i)))
        for i, update in enumerate(case.held.updates[0])
    ]
    assert sent == case.cohort()
    assert decoder.announce({}) == case.public.announced
    expected = case.codec.decoder.decode_sum(sent, [1] * 5, case.public, {})
    assert torch.equal(decoder.decode_sum(sent, [1] * 5, case.public, {}), expected)


def test_a_checkpoint_restores_the_codec_into_a_new_one(case: Case) -> None:
    again = CODECS[case.name]()
    restore_codec(again, codec_state(case.codec))
    assert again.fitted and again.version == case.codec.version
    encoded = again.encoder.encode_message(case.held.updates[0, 0], case.public, Private(torch.Generator().manual_seed(0)))
    assert encoded == case.message(case.held.updates[0, 0])


def test_fitting_is_deterministic_and_counts_versions(case: Case, adam: TrainCodec) -> None:
    again = CODECS[case.name]()
    again.fit(case.fit, adam)
    assert again.version == 1 and again.encoder.fingerprint == case.codec.encoder.fingerprint
    again.fit(case.fit, adam)
    assert again.version == 2 and again.encoder.fingerprint == again.decoder.fingerprint != case.codec.encoder.fingerprint


def test_a_codec_that_needs_no_fit_works_once_bound(case: Case) -> None:
    codec = CODECS[case.name]()
    assert not codec.fitted
    codec.bind(case.fit.layout)
    assert codec.bound and codec.fitted != codec.needs_fit


def test_references_make_codes_no_longer_than_the_codecs_first_stage(case: Case, adam: TrainCodec) -> None:
    first = case.codec.codecs[0] if isinstance(case.codec, ChainCodec) else case.codec
    for reference in case.codec.references().values():
        reference.fit(case.fit, adam)
        assert reference.encoder.code_dim == first.encoder.code_dim


# Integer codes


@rounding
def test_rounding_is_unbiased_inside_the_range(case: Case) -> None:
    quantizer, exact = quantizer_of(case)
    gain = gain_of(case)
    limit = quantizer.format.limit
    inside = exact.abs() / (quantizer.step * gain) <= limit
    draws = 4000
    update = case.held.updates[0, 0]
    codes = torch.stack([case.encode(update, seed) for seed in range(draws)])
    mean = codes.double().mean(0) * quantizer.step.double() * gain
    # A rounded value's variance is at most a quarter of a squared step.
    tolerance = 5 * 0.5 / draws**0.5 * quantizer.step.double() * gain
    assert inside.float().mean() > 0.9
    assert ((mean - exact).abs() <= tolerance)[inside].all()
    # All coefficients together see a much smaller bias, in steps.
    overall = ((mean - exact) / (quantizer.step * gain))[inside].mean()
    assert overall.abs() <= 5 * 0.5 / (draws * int(inside.sum())) ** 0.5


@rounding
def test_clients_round_independently(case: Case) -> None:
    quantizer, exact = quantizer_of(case)
    codes = torch.stack([case.encode(case.held.updates[0, 0], seed) for seed in range(200)])
    error = codes.double() - exact / (quantizer.step * gain_of(case))
    inside = error.abs().amax(0) < 1
    correlation = torch.corrcoef(error[:20, inside]) - torch.eye(20)
    assert correlation.abs().max() < 6 / int(inside.sum()) ** 0.5


@rounding
@pytest.mark.parametrize("sign", [1, -1])
def test_values_beyond_the_range_saturate(case: Case, sign: int) -> None:
    quantizer, exact = quantizer_of(case, sign * 1e6 * case.held.updates[0, 0].sign())
    code = case.encode(sign * 1e6 * case.held.updates[0, 0].sign())
    beyond = exact.abs() > quantizer.step * gain_of(case) * quantizer.format.limit
    assert beyond.any() and torch.equal(code[beyond], (quantizer.format.limit * exact.sign()[beyond]).int())
    assert code.abs().max() == quantizer.format.limit


@rounding
def test_integer_sums_are_exact(case: Case) -> None:
    weights = [10**9 + i for i in range(5)]
    codes = [case.encode(update, i) for i, update in enumerate(case.held.updates[0])]
    exact = [sum(w * int(code[j]) for w, code in zip(weights, codes, strict=True)) for j in range(len(codes[0]))]
    mean = torch.tensor([value / sum(weights) for value in exact], dtype=torch.float64).float()
    assert torch.equal(case.codec.decoder.decode_sum(case.cohort(), weights, case.public, {}), case.decode(mean))


def test_a_gain_is_announced_before_the_round_and_decoding_does_not_change_it(case: Case) -> None:
    decoder = case.codec.decoder
    state: dict[str, object] = {}
    public = replace(case.public, announced=decoder.announce(state), clients=5)
    mean = torch.stack([case.encode(10 * update, i) for i, update in enumerate(case.held.updates[0])]).float().mean(0)
    first = decoder.decode(mean, public, state)
    assert torch.equal(decoder.decode(mean, public, state), first)  # with the same announcement, whatever the state is by now
    if case.rounds_codes:
        assert gain_in(decoder.announce(state)) > gain_in(public.announced)
        later = decoder.decode(mean, replace(public, announced=decoder.announce(state)), state)
        assert not torch.equal(later, first)
    else:
        assert not public.announced


@rounding
def test_the_gain_follows_updates_that_grow_and_shrink(case: Case) -> None:
    gains = {}
    for scale in (0.2, 1.0, 5.0):
        state: dict[str, object] = {}
        for round in range(12):
            public = Public(seed=1, round=round, announced=case.codec.decoder.announce(state))
            messages = [
                case.codec.encoder.encode_message(scale * update, public, Private(torch.Generator().manual_seed(100 * round + i)))
                for i, update in enumerate(case.held.updates[round])
            ]
            case.codec.decoder.decode_sum(messages, [1] * 5, public, state)
        gains[scale] = gain_in(case.codec.decoder.announce(state))
    assert gains[0.2] < gains[1.0] < gains[5.0] and all(math.isfinite(gain) and gain > 0 for gain in gains.values())


def test_encoding_changes_no_scale(case: Case) -> None:
    """What a client's own update is like must not reach another client's code but through the sum."""
    before, first = codec_state(case.codec), case.encode(case.held.updates[0, 0])
    case.message(1e6 * case.held.updates[0, 1])
    after = codec_state(case.codec)
    assert torch.equal(case.encode(case.held.updates[0, 0]), first) and case.codec.decoder.announce({}) == case.public.announced
    assert all(torch.equal(before["encoder"][key], after["encoder"][key]) for key in before["encoder"])


def gain_in(announced: object) -> float:
    assert isinstance(announced, dict)
    found = announced.get("gain")
    return float(found) if found is not None else gain_in(next(value for value in announced.values() if value))


def gain_of(case: Case) -> float:
    return gain_in(dict(case.public.announced))


def quantizer_of(case: Case, update: Tensor | None = None) -> tuple[torch.nn.Module, Tensor]:
    """The rounding half of the encoder, and what it is given (float64) for an update."""
    update = case.held.updates[0, 0] if update is None else update
    if not isinstance(case.codec, ChainCodec):
        return case.codec.encoder, update.double()
    first, last = case.codec.encoder.stages
    return last, first.encode(update, Public(), Private(torch.Generator())).detach().double()


# Refusals


class Longer(IdentityCodec):
    """Claims a code one number longer than the update."""

    def make_encoder(self, layout: Layout, plan: dict[str, object]):
        return super().make_encoder(Layout.vector(layout.dim + 1), plan)

    def make_decoder(self, layout: Layout, plan: dict[str, object]):
        return super().make_decoder(Layout.vector(layout.dim + 1), plan)


class Disagreeing(Longer):
    """An encoder and a decoder of different codes."""

    def make_decoder(self, layout: Layout, plan: dict[str, object]):
        return IdentityCodec.make_decoder(self, layout, plan)


def test_a_code_longer_than_the_update_is_refused(layout: Layout) -> None:
    codec = Longer()
    with pytest.raises(ConfigurationError, match=r"no longer than the update \(133 numbers\) but Longer makes one of 134"):
        codec.bind(layout)
    assert not codec.bound


def test_halves_that_disagree_are_refused(layout: Layout) -> None:
    with pytest.raises(ConfigurationError, match="Disagreeing: encoder and decoder disagree"):
        Disagreeing().bind(layout)


@pytest.mark.parametrize(
    "codec", [LinearCodec(100, block_size=16), AutoencoderCodec(100, block_size=16), ChainCodec([LinearCodec(100, block_size=16)])]
)
def test_a_code_shorter_than_one_number_a_block_is_refused(
    codec: Codec, layout: Layout, banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec
) -> None:
    with pytest.raises(ConfigurationError, match="one a block.*smaller `ratio` or a larger `block_size`"):
        codec.bind(layout)
    with pytest.raises(ConfigurationError, match="one a block"):
        codec.fit(banks[0], adam)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearCodec(ratio=0.5), "`ratio` >= 1.*0.5"),
        (lambda: LinearCodec(block_size=-1), "`block_size` >= 0.*-1"),
        (lambda: LinearCodec(cohort=-1), "`cohort` >= 0.*-1"),
        (lambda: AutoencoderCodec(ratio=0.5), "`ratio` >= 1 but got 0.5"),
        (lambda: AutoencoderCodec(depth=-1), "`depth` >= 0 but got -1"),
        (lambda: AutoencoderCodec(width=0), "`width` >= 1 but got 0"),
        (lambda: AutoencoderCodec(block_size=0), "`block_size` >= 1 but got 0"),
        (lambda: AutoencoderCodec(activation="swish"), "`activation` to be one of .* but got 'swish'"),
        (lambda: AutoencoderCodec(skip=False), "`skip=true` with `start='pca'`"),
        (lambda: QuantizeCodec(bits=1), "`bits` in 2..16.*1"),
        (lambda: QuantizeCodec(bits=17), "`bits` in 2..16.*17"),
        (lambda: QuantizeCodec(clip=0), "`clip` > 0"),
        (lambda: ChainCodec([]), "`codecs` to name at least one codec"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable[[], Codec], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
