"""The privacy cost of releasing noisy sums: epsilon at a delta, by Google's ``dp-accounting``, and the noise for a target epsilon.

A release is (noise multiplier, sampling rate): a Gaussian sum of standard deviation ``multiplier * sensitivity`` over a cohort that every
user joins with probability ``rate`` (1: everybody takes part, or the adversary sees who does).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from fedlight.core.process import quiet
from fedlight.privacy.noise import import_extra

Releases = tuple[tuple[float, float, int], ...]
"""(noise multiplier, sampling rate, number of releases)."""

Accountant = Callable[[Releases, float], float]
"""Maps releases and delta to epsilon."""

INTERVAL = 5e-4
"""Bin width of privacy losses, rounded up: 5 times the library's default, in a fifth of the time."""

INTEGER_ORDERS = (*range(2, 257), 512, 1024)

LEAST_MULTIPLIER = 0.05
"""Smallest multiplier to calibrate to; a smaller one protects nothing."""


def rdp_epsilon(releases: Releases, delta: float, orders: tuple[int, ...] | None = None) -> float:
    """Return epsilon by Renyi differential privacy (Mironov 2017, arXiv 1702.07476; sampled: Mironov et al. 2019, arXiv 1908.10530).

    At integer ``orders`` only it also holds for discrete Gaussian noise: at integer orders and integer shifts the moments of its likelihood
    ratio are exactly those of the continuous one (Canonne et al. 2020, arXiv 2004.00010, Proposition 5), and so are those of a
    Poisson-sampled sum, which are sums of them.
    """
    if not releases:
        return 0.0
    events, rdp = import_extra("dp_accounting"), import_extra("dp_accounting.rdp")
    with quiet("absl"):  # its warnings about skipped fractional orders, which only make epsilon larger
        accountant = rdp.RdpAccountant(orders)
        for multiplier, rate, times in releases:
            event = events.GaussianDpEvent(multiplier)
            accountant.compose(event if rate == 1 else events.PoissonSampledDpEvent(rate, event), times)
        return float(accountant.get_epsilon(delta))


def pld_epsilon(releases: Releases, delta: float) -> float:
    """Return epsilon by composing privacy loss distributions, the tightest method for Gaussian noise (Koskela, arXiv 1906.03049)."""
    if not releases:
        return 0.0
    total = None
    for multiplier, rate, times in releases:
        part = _loss_distribution(multiplier, rate).self_compose(times)
        total = part if total is None else total.compose(part)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


ACCOUNTANTS: dict[str, Accountant] = {
    "pld": pld_epsilon,
    "rdp": rdp_epsilon,
    "rdp of integer orders": partial(rdp_epsilon, orders=INTEGER_ORDERS),
}


@lru_cache(maxsize=4096)
def epsilon(accountant: str, releases: Releases, delta: float) -> float:
    """Return the epsilon of these releases at ``delta``, by the accountant with this name; inf without noise."""
    if any(multiplier <= 0 and times for multiplier, _, times in releases):
        return math.inf
    return ACCOUNTANTS[accountant](releases, delta)


def calibrate(accountant: str, target: float, delta: float, rate: float, rounds: int) -> float:
    """Return the least noise multiplier (to 1 part in 10,000) at which ``rounds`` releases cost at most ``target``."""

    def affordable(multiplier: float) -> bool:
        return epsilon(accountant, ((multiplier, rate, rounds),), delta) <= target

    high = 1.0
    while not affordable(high):
        high *= 2
    low = high / 2
    while low > LEAST_MULTIPLIER and affordable(low):
        low, high = low / 2, low
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if affordable(middle) else (middle, high)
    return high


def discrete_sum_multiplier(bound: float, deviation: float, shares: int, length: int) -> float:
    """Return the Gaussian noise multiplier equivalent to a sum of ``shares`` discrete Gaussians on integers of norm at most ``bound``.

    A sum of discrete Gaussians is not a discrete Gaussian: it is as private as a Gaussian of multiplier ``1 / (bound / (sqrt(shares)
    deviation) + tau sqrt(length))``, ``tau = 10 sum_k exp(-2 pi^2 deviation^2 k / (k+1))`` over k = 1 .. shares - 1 (Kairouz et al. 2021,
    arXiv 2102.06387, Theorem 1, third bound; ``deviation`` >= 1/2, of each share).
    """
    tau = 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, shares))
    return 1 / (bound / (math.sqrt(shares) * deviation) + tau * math.sqrt(length))


@lru_cache(maxsize=64)
def _loss_distribution(multiplier: float, rate: float) -> Any:
    pld = import_extra("dp_accounting.pld.privacy_loss_distribution")
    return pld.from_gaussian_mechanism(multiplier, value_discretization_interval=INTERVAL, sampling_prob=rate)
