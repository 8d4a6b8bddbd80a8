from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation.secure import SumFormat
from fedlight.codecs import ChainCodec, StackedCodec, WindowCodec
from fedlight.codecs.window import LIMITS, Deviations
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, ServerContext, State
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.windows import WindowFormat
from fedlight.core.wire import HEADER

DIM = 3000


def bank_of(rounds: int = 8, clients: int = 10, decay: float = 1.0, seed: int = 0, shared: float = 0.3) -> UpdateBank:
    """Updates over directions of very unequal energy, with something that the clients of a round share, in rounds that shrink."""
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn(rounds, clients, DIM, generator=generator) + shared * torch.randn(rounds, 1, DIM, generator=generator)
    return UpdateBank(updates * torch.logspace(0, -2, DIM) * decay ** torch.arange(rounds)[:, None, None], Layout.vector(DIM))


def fitted(bank: UpdateBank, ratio: float = 6.0, clients: int = 10, tails: float = 3.5) -> WindowCodec:
    codec = WindowCodec(ratio, clients, tails)
    codec.fit(bank, lambda *_: {})
    return codec


def masked_round(codec: Codec, updates: torch.Tensor, state: State) -> tuple[torch.Tensor, int, float]:
    """The aggregate of a round whose sum the server has modulo the windows; how many were put right; the share that was lost."""
    format = SumFormat.of(codec.encoder.format, codec.most_clients)
    context = Context(broadcast=codec.decoder.broadcast(state))
    codes = codec.encoder.encode(updates, context, Private(torch.Generator()))
    words = np.zeros(format.length, np.uint64)
    for code in codes:
        words = (words + format.words(code.numpy(), 1)) % format.modulus
    total, weight, wrapped, lost = format.read_sum(words, len(updates))
    assert weight == len(updates)
    if not lost:
        assert (total == codes.sum(0).numpy()).all()
    known = ServerContext.of(context, len(updates), 0, lost)
    return codec.decoder.decode(torch.from_numpy(total).float() / weight, known, state), wrapped, lost


@pytest.mark.parametrize("ratio", [4, 6, 12, 40])
@pytest.mark.parametrize("clients", [3, 10, 50])
def test_a_masked_message_fits_its_ratio_and_uses_nearly_all_of_it(ratio: float, clients: int) -> None:
    codec = fitted(bank_of(), ratio, clients)
    format = codec.encoder.format
    assert isinstance(format, WindowFormat)
    length = HEADER.size + SumFormat.of(format, clients).payload_bytes
    assert length == HEADER.size + format.masked_bytes and 0.95 * 4 * DIM / ratio < length <= 4 * DIM / ratio


@given(seed=st.integers(0, 1000), clients=st.integers(4, 10))
def test_sums_are_exact_whoever_drops_out(seed: int, clients: int) -> None:
    """A sum of fewer clients lies within the same windows: 7 of 10 leave a smaller one."""
    updates = bank_of(1, clients, seed=seed).updates[0]
    _, _, lost = masked_round(fitted(bank_of()), updates, {})
    assert lost == 0


def test_windows_are_as_wide_as_so_many_deviations_of_the_sum() -> None:
    """Measured on other rounds: no more sums leave them than a normal distribution says, give or take what the gain is off."""
    wrapped = {}
    for tails in (3.0, 4.0, 6.0):
        state: State = {}
        codec = fitted(bank_of(), tails=tails)
        wrapped[tails] = sum(masked_round(codec, updates, state)[1] for updates in bank_of(10, seed=1))
        share = wrapped[tails] / (10 * codec.encoder.code_dim)
        assert share <= 5 * math.erfc(tails / math.sqrt(2)) + 1e-5
    assert wrapped[3.0] > wrapped[4.0] >= wrapped[6.0] == 0


def test_the_error_is_that_of_sums_without_windows() -> None:
    codec, state, clear = fitted(bank_of(), tails=3), {}, {}
    some = 0
    for updates in bank_of(6, seed=2):
        decoded, wrapped, lost = masked_round(codec, updates, state)
        some += wrapped
        assert lost == 0 and torch.equal(decoded, codec.reconstruct(updates, clear))
    assert some >= 3


def test_it_errs_less_than_codes_that_cannot_overflow_at_the_same_bytes() -> None:
    from fedlight.codecs import QuantizeCodec

    wide = ChainCodec([QuantizeCodec(2)])
    wide.fit(bank_of(), lambda *_: {})
    bytes = SumFormat.of(wide.encoder.format, 10).payload_bytes
    codec = fitted(bank_of(), 4 * DIM / (bytes + HEADER.size))
    updates = bank_of(1, seed=3).updates[0]

    def error(decoded: torch.Tensor) -> float:
        return float((decoded - updates.mean(0)).square().sum() / updates.mean(0).square().sum())

    assert error(masked_round(codec, updates, {})[0]) < 0.5 * error(wide.reconstruct(updates))


def test_a_cohort_that_overflows_everything_adds_nothing_and_the_next_ones_fit() -> None:
    """Updates that are a hundred times larger than any that was seen: the first sums are lost and told, then the gain has grown."""
    codec, state = fitted(bank_of()), {}
    losses, lengths = [], []
    for updates in bank_of(20, seed=4).recorded * 100:
        decoded, _, lost = masked_round(codec, updates, state)
        losses.append(lost)
        lengths.append(float(decoded.norm() / updates.mean(0).norm()))
    assert losses[0] > 0.9 and lengths[0] < 0.1 and max(lengths) < 1.2
    assert losses[-5:] == [0] * 5 and all(0.8 < length < 1.2 for length in lengths[-5:])


@pytest.mark.parametrize("decay", [0.8, 1.0, 1.2])
def test_the_gain_follows_updates_that_shrink_or_grow(decay: float) -> None:
    codec, state = fitted(bank_of()), {}
    for updates in bank_of(20, decay=decay, seed=5):
        decoded, _, lost = masked_round(codec, updates, state)
        mean = updates.mean(0)
        assert lost < 0.2 and float((decoded - mean).square().sum() / mean.square().sum()) < 0.5


def test_deviations_are_those_of_sums_of_any_cohort() -> None:
    """Of a bank of cohorts of 10: the sums of 40 other clients have them."""
    found, many = Deviations.of(bank_of(200), 40), bank_of(200, 40, seed=6)
    total = 40**2 * found.between + 40 * found.within
    measured = many.updates.sum(1).double().square().mean(0)
    ratio = measured / measured.mean() / total
    assert 0.97 < float(ratio.mean()) < 1.03 and float(total.mean()) == pytest.approx(1, rel=1e-3)


def test_limits_are_half_an_octave_apart() -> None:
    assert LIMITS[:6].tolist() == [1, 2, 3, 4, 6, 8] and int(LIMITS[-1]) == 2**16


@pytest.mark.parametrize("changes", [{"ratio": 0.5}, {"clients": 0}, {"tails": 1.5}])
def test_numbers_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=f"`{next(iter(changes))}` >="):
        WindowCodec(**changes)


def test_a_ratio_that_leaves_no_room_is_refused() -> None:
    for bank in (bank_of(), None):
        with pytest.raises(ConfigurationError, match="smaller `ratio`"):
            WindowCodec(1000).make_plan(Layout.vector(DIM), bank)


def test_a_plan_of_other_coefficients_is_refused() -> None:
    codec = fitted(bank_of())
    with pytest.raises(CodecMismatchError, match="windows of 3,001 coefficients but got 3,000"):
        codec.make_encoder(Layout.vector(DIM + 1), codec.plan)


def test_several_vectors_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="room for any codes, which an algorithm whose clients upload several"):
        StackedCodec(ChainCodec([WindowCodec()]))


def test_sums_of_more_clients_or_of_weights_are_refused() -> None:
    format = fitted(bank_of()).encoder.format
    for clients, weight in ((11, 1), (10, 2)):
        with pytest.raises(ConfigurationError, match="at most the 10 codes"):
            SumFormat.of(format, clients, weight)
