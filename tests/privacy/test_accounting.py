"""Epsilon against figures made with other software, and laws of the ledger."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlight.privacy.accounting import calibrate, discrete_sum_multiplier, epsilon
from fedlight.privacy.ledger import Ledger

ORACLES = [  # noise multiplier, sampling rate, rounds, RDP, PLD, at delta 1e-5
    (1.0, 1.0, 1, 4.7285, 4.3772),
    (5.0, 1.0, 100, 10.7255, 9.9973),
    (1.0, 0.01, 1000, 2.1014, 1.8282),
    (1.5, 0.04, 2250, 7.3293, 6.7688),
    (1.0, 0.1, 100, 7.9039, 7.0466),
]


@pytest.mark.parametrize(("multiplier", "rate", "rounds", "rdp", "pld"), ORACLES)
def test_epsilon_is_that_of_the_reference_figures(multiplier, rate, rounds, rdp, pld):
    releases = ((multiplier, rate, rounds),)
    assert epsilon("rdp", releases, 1e-5) == pytest.approx(rdp, abs=1e-3)
    assert epsilon("pld", releases, 1e-5) == pytest.approx(pld, abs=1e-3)
    assert epsilon("pld", releases, 1e-5) <= epsilon("rdp", releases, 1e-5) <= epsilon("rdp of integer orders", releases, 1e-5)
    assert epsilon("rdp of integer orders", releases, 1e-5) < 1.02 * rdp


@pytest.mark.parametrize(("rate", "multiplier"), [pytest.param(0.1, 0.936, marks=pytest.mark.slow), (1.0, 6.002)])
def test_the_noise_for_a_target_is_that_of_the_reference_figures(rate, multiplier):
    found = calibrate("pld", 8.0, 1e-5, rate, 100)
    assert found == pytest.approx(multiplier, abs=1e-3)
    assert 7.99 < epsilon("pld", ((found, rate, 100),), 1e-5) <= 8.0


@pytest.mark.slow
@settings(max_examples=6)
@given(target=st.floats(0.5, 20), rounds=st.integers(1, 200), rate=st.sampled_from([0.05, 0.3, 1.0]))
def test_a_calibrated_run_never_costs_more_than_its_target(target, rounds, rate):
    multiplier = calibrate("rdp", target, 1e-5, rate, rounds)
    assert epsilon("rdp", ((multiplier, rate, rounds),), 1e-5) <= target
    assert epsilon("rdp", ((0.99 * multiplier, rate, rounds),), 1e-5) > target or multiplier <= 0.1


def test_epsilon_grows_with_releases_and_falls_with_noise_and_with_sampling():
    by_rounds = [epsilon("pld", ((1.0, 0.1, rounds),), 1e-5) for rounds in (1, 10, 100)]
    by_noise = [epsilon("pld", ((z, 0.1, 100),), 1e-5) for z in (2.0, 1.0, 0.8)]
    by_rate = [epsilon("pld", ((1.0, rate, 10),), 1e-5) for rate in (0.01, 0.1, 1.0)]
    assert all(a < b for row in (by_rounds, by_noise, by_rate) for a, b in pairwise(row))
    assert epsilon("pld", ((0.0, 1.0, 1),), 1e-5) == math.inf


def test_the_ledger_counts_joins_equal_lines_and_survives_a_file():
    ledger = Ledger()
    assert len(ledger) == 0 and ledger.epsilon("pld", 1e-5) == 0.0 and ledger.epsilon("rdp", 1e-5) == 0.0
    for multiplier in (1.0, 1.0, 2.0, 1.0):
        before = ledger.after(multiplier, 0.1)
        ledger.add(multiplier, 0.1)
        assert tuple(ledger.lines) == before
    assert ledger.lines == [(1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 1)] and len(ledger) == 4
    other = Ledger()
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert other.lines == ledger.lines
    for accountant in ("pld", "rdp"):
        assert other.epsilon(accountant, 1e-5) == ledger.epsilon(accountant, 1e-5)
        assert ledger.epsilon(accountant, 1e-5, amplified=False) > ledger.epsilon(accountant, 1e-5)


def gaussian(deviation: float, last: int) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(-last, last + 1) / deviation) ** 2)
    return weights / weights.sum()


@pytest.mark.parametrize("deviation", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("shares", [2, 3])
def test_the_correction_for_sums_of_discrete_gaussians_covers_what_they_differ_by(deviation, shares):
    """The sum's likelihood ratio to one discrete Gaussian, computed, lies within tau (Kairouz et al. 2021, Theorem 9)."""
    last = 60
    one = gaussian(deviation, last)
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    like = gaussian(math.sqrt(shares) * deviation, shares * last)
    middle = slice(shares * last - 5, shares * last + 6)
    apart = np.abs(np.log(total[middle] / like[middle])).max()
    tau = 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, shares))
    assert 1e-12 < apart <= tau


def test_the_correction_is_nothing_on_a_fine_grid_and_the_papers_figure_at_variance_three():
    """Two shares of variance 3 differ from a Gaussian by less than 10^-11; on a grid of 1024 steps nothing can be computed any more."""
    variance_3 = discrete_sum_multiplier(1.0, math.sqrt(3), 2, 1)
    assert 0 < math.sqrt(6) - variance_3 < 1e-11
    assert discrete_sum_multiplier(1024, 1024 / math.sqrt(50), 50, 10_000) == pytest.approx(1.0, rel=1e-12)


def test_a_coarse_grid_is_worth_less_noise_in_longer_codes():
    worth = [discrete_sum_multiplier(4, 0.5, 10, length) for length in (1, 100, 10_000)]
    assert worth[0] > worth[1] > worth[2]
    assert worth[0] < math.sqrt(10) * 0.5 / 4
