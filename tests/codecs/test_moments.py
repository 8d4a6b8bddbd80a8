from __future__ import annotations

import math
from itertools import chain, product

import pytest
import torch
from torch import Tensor

from fedlight.codecs import moments
from fedlight.codecs.factors import orthonormal
from fedlight.codecs.matrices import Matrices, project, turn_back
from fedlight.codecs.moments import TwoSidedMoments, measure, round_rows
from fedlight.codecs.selection import split_grids
from fedlight.codecs.two_sided import cohort_energy, round_weights
from fedlight.core.bank import UpdateBank
from fedlight.core.layout import Layout

LAYOUT = Layout(("a.weight", "a.bias", "b.weight", "norm.weight"), ((12, 9), (12,), (8, 20), (5,)))
MATRICES = Matrices.of(LAYOUT)
RANK = 3


def low_rank_bank(noise: float = 0.0, rounds: int = 6, clients: int = 4) -> UpdateBank:
    """Every matrix is ``A M B^T`` with ``A`` and ``B`` of three columns, ``M`` drawn; the vector is drawn in two directions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    views = []
    for item in MATRICES.items:
        if item.plain:
            views.append((draw(rounds, clients, 2) @ draw(2, item.columns))[..., None, :])
            continue
        a, b = orthonormal(draw(item.rows, RANK)), orthonormal(draw(item.columns, RANK))
        views.append(a @ (draw(rounds, clients, RANK, RANK) * torch.tensor([4.0, 2.0, 1.0])) @ b.T)
    updates = MATRICES.join(views)
    return UpdateBank(updates + noise * draw(*updates.shape), LAYOUT)


def back(found: TwoSidedMoments, update: Tensor) -> Tensor:
    """Project on the bases and return."""
    views = []
    for grid, bases in zip(split_grids(project(MATRICES, update, found.bases), found.grids), found.bases, strict=True):
        views.append(turn_back(grid, bases) if bases else grid)
    return MATRICES.join(views)


@pytest.mark.parametrize("longest", [1024, 4], ids=["dense", "sketched"])
@pytest.mark.parametrize("cohort", [0, 1, 10])
@pytest.mark.parametrize("relative", [True, False])
def test_a_low_rank_bank_lies_in_the_bases_and_nothing_outside(longest, cohort, relative, monkeypatch):
    monkeypatch.setattr(moments, "LONGEST_DENSE_SIDE", longest)
    bank = low_rank_bank()
    found = measure(bank, MATRICES, cohort, 5, relative)
    torch.testing.assert_close(back(found, bank.updates), bank.updates, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack([found.mean.sum(1), found.spread.sum(1)], 1), found.total, rtol=1e-4, atol=1e-4)
    for part, (r1, r2), item in zip(torch.split(found.mean, [a * b for a, b in found.grids], 1), found.grids, MATRICES.items, strict=True):
        assert (r1, r2) == ((1, item.columns) if item.plain else (5, 5))
        if not item.plain:
            outside = part.view(-1, r1, r2).clone()
            outside[:, :RANK, :RANK] = 0
            assert outside.sum() < 1e-6 * part.sum()


@pytest.mark.parametrize("relative", [True, False])
def test_the_sketch_of_a_long_side_agrees_with_the_whole_gram_matrix(relative, monkeypatch):
    bank = low_rank_bank()
    dense = measure(bank, MATRICES, 10, RANK, relative)
    monkeypatch.setattr(moments, "LONGEST_DENSE_SIDE", 4)
    sketched = measure(bank, MATRICES, 10, RANK, relative)
    assert sketched.grids == dense.grids and torch.equal(sketched.total, dense.total)
    torch.testing.assert_close(sketched.mean, dense.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sketched.spread, dense.spread, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(chain(*dense.bases), chain(*sketched.bases), strict=True):
        torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("longest", [1024, 4], ids=["dense", "sketched"])
def test_columns_are_orthonormal_and_those_of_most_energy_come_first(longest, monkeypatch):
    monkeypatch.setattr(moments, "LONGEST_DENSE_SIDE", longest)
    bank = low_rank_bank(noise=0.05)
    found = measure(bank, MATRICES, 10, 5, False)
    for basis in chain(*found.bases):
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-5)
    energy = cohort_energy(found, 10, False)
    for part, grid, item in zip(torch.split(energy, [a * b for a, b in found.grids]), found.grids, MATRICES.items, strict=True):
        if not item.plain:
            for axis in (0, 1):
                along = part.view(grid).sum(axis)
                assert (along.diff() <= 1e-3 * along[0]).all()  # the order is that of the turn before, with the other side as it was


def test_a_cut_keeps_at_least_what_one_sided_pca_of_either_side_keeps():
    """Bases of both sides at once lose no more than the two one-sided cuts together (De Lathauwer et al. 2000, property 10)."""
    bank, rank = low_rank_bank(noise=0.5), 2
    found = measure(bank, MATRICES, 0, rank, False)
    means = bank.updates.mean(1)
    for g, bases in zip(MATRICES.view(means), found.bases, strict=True):
        if not bases:
            continue
        a, b = bases
        lost = (g - a @ (a.T @ g @ b) @ b.T).square().sum()
        tails = [torch.linalg.eigvalsh(s)[:-rank].sum() for s in (torch.einsum("sij,skj->ik", g, g), torch.einsum("sij,sik->jk", g, g))]
        assert max(tails) <= lost * 1.0001 and lost <= sum(tails) * 1.0001


@pytest.mark.parametrize("cohort", [1, 2, 3])
def test_the_energy_of_a_cohort_is_the_second_moment_of_means_of_its_clients(cohort):
    """Over all cohorts of so many recorded clients, drawn with replacement: exactly."""
    bank = low_rank_bank(rounds=3, clients=3)
    found = measure(bank, MATRICES, cohort, 20, False)
    means = torch.stack([bank.updates[:, list(chosen)].mean(1) for chosen in product(range(3), repeat=cohort)])
    empirical = project(MATRICES, means, found.bases).square().mean((0, 1))
    torch.testing.assert_close(cohort_energy(found, cohort, False), empirical, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cohort", [1, 2, 3])
def test_the_rows_of_a_round_have_the_gram_matrix_of_its_cohorts_means(cohort):
    bank = low_rank_bank(rounds=2, clients=3)
    for updates, rows in zip(bank.updates, round_rows(bank, cohort, False), strict=True):
        means = torch.stack([updates[list(chosen)].mean(0) for chosen in product(range(3), repeat=cohort)])
        torch.testing.assert_close(rows.T @ rows, means.T @ means / len(means), rtol=1e-3, atol=1e-4)


def test_without_a_cohort_size_the_recorded_means_are_all_that_counts():
    """Spread that cancels in every recorded cohort does not turn the bases."""
    bank = low_rank_bank()
    generator = torch.Generator().manual_seed(1)
    spread = 100 * torch.randn(bank.updates.shape, generator=generator)
    spread -= spread.mean(1, keepdim=True)
    noisy = UpdateBank(bank.updates + spread, LAYOUT)
    for rows in round_rows(noisy, 0, False):
        assert rows.shape == (1, LAYOUT.dim)
    found = measure(noisy, MATRICES, 0, RANK, False)
    means = bank.updates.mean(1)
    torch.testing.assert_close(back(found, means), means, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(cohort_energy(found, 0, False), found.mean.mean(0))


def test_relative_rounds_count_equally_however_small_they_are():
    bank = low_rank_bank()
    scale = torch.logspace(0, -3, bank.rounds)[:, None, None]
    shrinking = UpdateBank(bank.updates * scale, LAYOUT)
    for rows in round_rows(shrinking, 10, True):
        assert float(rows.norm()) == pytest.approx(1, rel=1e-5)
    for mine, theirs in zip(round_rows(shrinking, 10, True), round_rows(bank, 10, True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    one, other = (measure(b, MATRICES, 10, RANK, True) for b in (bank, shrinking))
    a, b = cohort_energy(one, 10, True), cohort_energy(other, 10, True)
    torch.testing.assert_close(a / a.sum(), b / b.sum(), rtol=1e-2, atol=1e-4)
    assert (round_weights(one, False) == 1).all()
    weighted = round_weights(other, True) * other.total.sum(1, keepdim=True)
    torch.testing.assert_close(weighted, weighted.mean().expand_as(weighted))


def test_measuring_is_repeatable_and_draws_nothing_from_the_global_generator(monkeypatch):
    monkeypatch.setattr(moments, "LONGEST_DENSE_SIDE", 4)
    before = torch.get_rng_state()
    one, two = (measure(low_rank_bank(0.1), MATRICES, 10, RANK, True) for _ in range(2))
    assert torch.equal(one.mean, two.mean) and torch.equal(before, torch.get_rng_state())


def test_a_bank_of_zeros_has_no_energy_and_still_has_bases():
    found = measure(UpdateBank(torch.zeros(3, 2, LAYOUT.dim), LAYOUT), MATRICES, 10, RANK, True)
    assert not found.mean.any() and not found.total.any()
    assert all(torch.isfinite(basis).all() for basis in chain(*found.bases))
    assert math.isfinite(float(cohort_energy(found, 10, True).sum()))
