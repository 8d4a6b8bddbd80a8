from __future__ import annotations

import pytest
import torch

from fedlight.codecs import LinearCodec
from fedlight.codecs.blocks import Blocks, principal
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round


def no_training(codec: Codec, bank: UpdateBank) -> dict[str, float]:
    raise AssertionError("a linear codec is fitted in closed form")


def error(codec: Codec, bank: UpdateBank) -> float:
    """Squared error of the decoded means over the bank's rounds."""
    return float((codec.reconstruct(bank.updates) - bank.updates.mean(1)).double().square().sum())


@pytest.mark.parametrize("blocks", ["rows", "flat"])
@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("cohort", [0, 5])
def test_pca_beats_random_directions_on_held_out_updates(
    blocks: str, ratio: float, cohort: int, banks: tuple[UpdateBank, UpdateBank]
) -> None:
    fit, held = banks
    pca = LinearCodec(ratio, "pca", blocks, 16, cohort)
    pca.fit(fit, no_training)
    for seed in range(5):
        random = LinearCodec(ratio, "random", blocks, 16, cohort, seed)
        random.fit(fit, no_training)
        assert random.encoder.code_dim == pca.encoder.code_dim
        assert error(pca, held) < (0.75 if blocks == "rows" else 1.0) * error(random, held)


@pytest.mark.parametrize(("block_size", "rounds"), [(8, 40), (16, 40), (0, 40), (0, 200), (64, 30)])
def test_the_error_on_its_own_bank_is_the_energy_left_out(block_size: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) * 0.8 ** torch.arange(64)[:, None]
    bank = UpdateBank(torch.randn(rounds, 3, 64, generator=generator) @ mixing, Layout.vector(64))
    codec = LinearCodec(4, "pca", "flat", block_size, cohort=0)
    codec.fit(bank, no_training)
    (group,) = Blocks.from_plan(bank.layout, codec.plan).groups
    energies, _ = principal(bank.updates.mean(1).reshape(-1, group.count, group.length))
    assert error(codec, bank) == pytest.approx(float(energies[group.code :].sum()), rel=1e-3)


@pytest.mark.parametrize("basis", ["pca", "random"])
@pytest.mark.parametrize("blocks", ["rows", "flat"])
def test_the_basis_is_orthonormal_and_its_own_decoder(basis: str, blocks: str, banks: tuple[UpdateBank, UpdateBank]) -> None:
    codec = LinearCodec(4, basis, blocks, 16)
    codec.fit(banks[0], no_training)
    mine, theirs = codec.encoder.state_dict(), codec.decoder.state_dict()
    for key, columns in mine.items():
        torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5, rtol=0)
        assert torch.equal(columns, theirs[key])


def test_projecting_twice_is_projecting_once(banks: tuple[UpdateBank, UpdateBank]) -> None:
    codec = LinearCodec(4, "pca", "flat", 19)  # 133 = 7 * 19: no padding
    codec.fit(banks[0], no_training)
    once = codec.reconstruct(banks[1].updates[:, :1])
    torch.testing.assert_close(codec.reconstruct(once[:, None]), once, atol=1e-6, rtol=1e-4)


def test_random_directions_come_from_the_seed(layout: Layout) -> None:
    def tensors(seed: int) -> list[torch.Tensor]:
        return list(LinearCodec(4, "random", block_size=16, seed=seed).bind(layout).encoder.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(tensors(1), tensors(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(tensors(1), tensors(2), strict=True))


def test_directions_that_the_bank_never_moved_in_are_left_out(layout: Layout) -> None:
    """With one recorded round there is one direction: the rest of the code is zero, and nothing else is made up."""
    update = torch.randn(1, 1, layout.dim, generator=torch.Generator().manual_seed(0))
    codec = LinearCodec(4, "pca", "flat", 0, cohort=0)
    codec.fit(UpdateBank(update, layout), no_training)
    torch.testing.assert_close(codec.reconstruct(update), update[0], atol=1e-5, rtol=1e-4)
    code = codec.encoder.encode(torch.randn(layout.dim), None, None)
    assert int(code.count_nonzero()) == 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_fit_does_not_depend_on_the_scale_of_the_updates(scale: float, banks: tuple[UpdateBank, UpdateBank]) -> None:
    fit, held = banks
    codec = LinearCodec(4, block_size=16)
    codec.fit(UpdateBank(fit.updates * scale, fit.layout), no_training)
    reference = LinearCodec(4, block_size=16)
    reference.fit(fit, no_training)
    assert error(codec, held) == pytest.approx(error(reference, held), rel=0.02)


def test_fresh_directions_belong_to_the_round_whoever_draws_them_and_when(layout: Layout) -> None:
    def code(codec: Codec, round: int) -> torch.Tensor:
        return codec.encoder.encode(torch.linspace(-1, 1, layout.dim), Context(round=round), Private(torch.Generator()))

    def fresh(seed: int = 1) -> Codec:
        return LinearCodec(4, "random", block_size=16, seed=seed, fresh=True).bind(layout)

    codec = fresh()
    forward = [code(codec, round) for round in (0, 1, 2, 7)]
    backward = [code(codec, round) for round in (7, 2, 1, 0)][::-1]
    others = [code(fresh(), round) for round in (0, 1, 2, 7)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(forward, backward, others, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(forward) for b in forward[:i])
    assert not torch.equal(code(fresh(2), 1), forward[1])


def test_fresh_directions_cost_no_download_and_both_halves_agree(layout: Layout) -> None:
    codec = LinearCodec(1, "random", "flat", 19, fresh=True).bind(layout)  # 133 = 7 * 19
    assert not codec.encoder.state_dict() and not codec.decoder.state_dict()
    update = torch.linspace(-1, 1, layout.dim)
    for round in (5, 3):  # at ratio 1 the basis is square: what one half encodes the other decodes exactly
        torch.testing.assert_close(simulate_round(codec, update[None], context=Context(round=round)), update, atol=1e-5, rtol=1e-5)


def test_fresh_directions_see_all_of_an_update_in_time(layout: Layout) -> None:
    """On average over rounds a share of the update comes through, the share that the code has; a fixed basis misses the same always."""
    update = torch.randn(1, layout.dim, generator=torch.Generator().manual_seed(0))
    errors = {}
    for fresh in (True, False):
        codec = LinearCodec(4, "random", "flat", 19, fresh=fresh).bind(layout)
        mean = torch.stack([simulate_round(codec, update, context=Context(round=round)) for round in range(400)]).mean(0)
        errors[fresh] = float((mean * layout.dim / codec.encoder.code_dim - update[0]).norm() / update.norm())
    assert errors[True] < 0.15 < 1 < errors[False]


def test_reconstruct_takes_the_directions_of_round_0(layout: Layout) -> None:
    codec = LinearCodec(4, "random", block_size=16, fresh=True).bind(layout)
    update = torch.linspace(-1, 1, layout.dim)[None]
    simulate_round(codec, update, context=Context(round=9))
    torch.testing.assert_close(codec.reconstruct(update), simulate_round(codec, update))
