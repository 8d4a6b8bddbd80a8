from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedlight.aggregation.secure import SumFormat
from fedlight.codecs import TransformCodec
from fedlight.codecs.allocation import masked_cost
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context, Private
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import load_codec, load_decoder, load_encoder, save_codec
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER, saturation

WIDE = Layout(("a.weight", "a.bias", "b.weight", "b.bias", "norm"), ((30, 40), (30,), (16, 30), (16,), (20,)))


def bank_of(layout: Layout, rounds: int = 8, clients: int = 4, decay: float = 1.0, seed: int = 0) -> UpdateBank:
    """Noise over directions of very unequal energy, in rounds that shrink."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.logspace(0, -2, layout.dim)[torch.randperm(layout.dim, generator=torch.Generator().manual_seed(0))]
    updates = torch.randn(rounds, clients, layout.dim, generator=generator) + torch.randn(rounds, 1, layout.dim, generator=generator)
    return UpdateBank(updates * energy * decay ** torch.arange(rounds)[:, None, None], layout)


def fitted(bank: UpdateBank, *args: float, **changes: object) -> TransformCodec:
    codec = TransformCodec(*args, **{"encoder_share": 10.0, "cohort": 4} | changes)
    codec.fit(bank, lambda *_: {})
    return codec


def message(codec: TransformCodec, update: torch.Tensor, seed: int = 0) -> bytes:
    context = Context(broadcast=codec.decoder.broadcast({}))
    return codec.encoder.encode_message(update, context, Private(torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("ratio", [6, 8, 11.3, 16, 32, 64, 100])
def test_a_message_fits_its_ratio_and_uses_nearly_all_of_it(ratio: float) -> None:
    bank = bank_of(WIDE)
    most = int(4 * WIDE.dim / ratio)
    length = len(message(fitted(bank, ratio), bank.updates[0, 0]))
    assert 0.9 * most < length + len(range(7)) and length <= most  # 7 bytes are for the padding of parts
    if ratio <= 32:
        assert length > 0.9 * most


shapes = st.one_of(
    st.tuples(st.integers(1, 60)),
    st.tuples(st.integers(2, 30), st.integers(2, 30)),
    st.tuples(st.integers(2, 8), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


@given(shapes=st.lists(shapes, min_size=1, max_size=4), ratio=st.floats(1, 60), secure=st.sampled_from([0, 5]))
@settings(max_examples=25)
def test_a_message_of_any_layout_fits_its_ratio_or_the_ratio_is_refused(shapes: list[tuple[int, ...]], ratio: float, secure: int) -> None:
    layout = Layout(tuple(f"{i}.weight" for i in range(len(shapes))), tuple(shapes))
    bank = bank_of(layout, rounds=4, clients=3)
    most = int(4 * layout.dim / ratio)
    if 8 * (most - HEADER.size - 7 - (16 if secure else 0)) < (masked_cost(secure)(2) if secure else 2):
        with pytest.raises(ConfigurationError, match="smaller `ratio`"):
            fitted(bank, ratio, secure_cohort=secure)
        return
    codec = fitted(bank, ratio, secure_cohort=secure)
    assert len(message(codec, bank.updates[0, 0])) == HEADER.size + codec.encoder.format.payload_bytes <= most


@pytest.mark.parametrize("clients", [2, 10, 100])
def test_a_masked_message_fits_the_ratio_headroom_included(clients: int) -> None:
    bank = bank_of(WIDE)
    codec = fitted(bank, 8, secure_cohort=clients)
    cost = masked_cost(clients)
    parts = getattr(codec.encoder.format, "parts", (codec.encoder.format,))
    bits = sum(part.length * cost(part.bits) for part in parts)
    assert 0.9 * 4 * WIDE.dim / 8 < HEADER.size + 7 + 16 + bits / 8 <= 4 * WIDE.dim / 8
    assert HEADER.size + SumFormat.of(codec.encoder.format, clients).payload_bytes <= 4 * WIDE.dim / 8
    assert codec.encoder.code_dim < fitted(bank, 8).encoder.code_dim


def test_two_exports_load_to_the_same_halves(tmp_path: Path) -> None:
    bank = bank_of(WIDE)
    codec = fitted(bank, 16, correct_energy=True)
    for name in "ab":
        save_codec(codec, tmp_path / name)
    for file in ("encoder.safetensors", "decoder.safetensors"):
        a, b = tmp_path / "a" / file, tmp_path / "b" / file
        mine, theirs = load_file(a), load_file(b)
        assert a.stat().st_size == b.stat().st_size and all(torch.equal(mine[key], theirs[key]) for key in mine | theirs)
    encoder, decoder = load_encoder(tmp_path / "a" / "encoder.safetensors"), load_decoder(tmp_path / "b" / "decoder.safetensors")
    context = Context(broadcast=decoder.broadcast({}))
    sent = [encoder.encode_message(u, context, Private(torch.Generator().manual_seed(i))) for i, u in enumerate(bank.updates[0])]
    assert sent == [message(codec, u, i) for i, u in enumerate(bank.updates[0])]
    assert torch.equal(decoder.decode_sum(sent, [1] * 4, context, {}), codec.decoder.decode_sum(sent, [1] * 4, context, {}))
    assert load_codec(tmp_path / "a").encoder.fingerprint == codec.encoder.fingerprint


def test_encoder_and_decoder_compute_with_the_same_factors_and_step() -> None:
    codec = fitted(bank_of(WIDE), 16)
    mine, theirs = codec.encoder.stage(0), codec.decoder.stage(0)
    cpu = torch.device("cpu")
    assert all(torch.equal(a, b) for a, b in zip(mine.factors.bases(cpu), theirs.factors.bases(cpu), strict=True))
    assert torch.equal(codec.encoder.stage(1).step, codec.decoder.stage(1).step)


@pytest.mark.parametrize("decay", [0.8, 0.9, 1.0, 1.1])
def test_the_gain_follows_updates_that_shrink_or_grow(decay: float) -> None:
    """After a while codes have the same size in steps, however small the updates; neither do they saturate nor vanish."""
    codec = fitted(bank_of(WIDE, decay=0.7), 8)
    run = bank_of(WIDE, rounds=20, decay=decay, seed=1)
    state: dict[str, object] = {}
    sizes, gains, saturated = [], [], []
    for number, updates in enumerate(run.updates):
        context = Context(round=number, broadcast=codec.decoder.broadcast(state))
        codes = codec.encoder.encode(updates, context, Private(torch.Generator().manual_seed(number)))
        simulate_round(codec, updates, context=context, server_state=state)
        sizes.append(float(codes.double().square().mean().sqrt()))
        saturated.append(saturation(codes[0], codec.encoder.format))
        gains.append(context.broadcast["1"]["gain"])
    assert max(sizes) / min(sizes) < 1.2 * max(decay, 1 / decay) ** 2  # a smoothing of a half is two rounds behind
    assert gains[-1] / gains[0] == pytest.approx(decay**18, rel=0.5)
    assert max(saturated) - min(saturated) < 0.2


def test_more_bytes_make_fewer_errors_on_the_bank() -> None:
    bank = bank_of(WIDE)
    target = bank.updates.mean(1)
    errors = []
    for ratio in (64, 32, 16, 8, 4):
        codec = fitted(bank, ratio)
        state: dict[str, object] = {}
        decoded = torch.stack([simulate_round(codec, u, context=Context(round=i), server_state=state) for i, u in enumerate(bank.updates)])
        errors.append(float((decoded - target).square().sum() / target.square().sum()))
    assert all(later < earlier for earlier, later in pairwise(errors)) and errors[-1] < 0.02


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_energy_correction_gives_decoded_means_their_length_back(decay: float) -> None:
    """Also where updates shrink: the gain moves with them, as in a run."""
    bank = bank_of(WIDE, decay=decay)
    lengths = {}
    for correct in (False, True):
        codec = fitted(bank, 24, correct_energy=correct)
        state: dict[str, object] = {}
        decoded = [simulate_round(codec, u, context=Context(round=i), server_state=state) for i, u in enumerate(bank.updates)]
        ratios = [float((d.norm() / u.mean(0).norm()) ** 2) for d, u in zip(decoded, bank.updates, strict=True)]
        lengths[correct] = (sum(ratios) / len(ratios)) ** 0.5
    assert abs(lengths[True] - 1) < 0.05 and abs(lengths[False] - 1) > 2 * abs(lengths[True] - 1)


def test_the_figures_of_a_fit_say_what_was_chosen() -> None:
    codec = TransformCodec(16, encoder_share=0.5)
    figures = codec.fit(bank_of(WIDE), lambda *_: {})
    assert figures == {"coefficients": codec.encoder.code_dim, "factor_bytes": sum(t.nbytes for t in codec.encoder.state_dict().values())}


@pytest.mark.parametrize("changes", [{"cohort": 0}, {"secure_cohort": -1}, {"smoothing": 1.5}])
def test_numbers_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=f"`{next(iter(changes))}`"):
        TransformCodec(**changes)


def test_secure_sums_of_so_many_clients_that_no_coefficient_fits_are_refused() -> None:
    layout = Layout(("w",), ((5, 5),))
    with pytest.raises(ConfigurationError, match="smaller `ratio`"):
        fitted(bank_of(layout), 100 / 25, secure_cohort=10**6)
    assert fitted(bank_of(layout), 100 / 25).encoder.code_dim >= 1


def test_what_a_tight_encoder_forbids_is_not_paid_for() -> None:
    """Bits go to coefficients whose basis columns may be kept: pruning the factors leaves no budget behind."""
    bank = bank_of(WIDE)
    codec = fitted(bank, 12, encoder_share=0.3)
    most = int(4 * WIDE.dim / 12)
    assert len(message(codec, bank.updates[0, 0])) > 0.9 * most
