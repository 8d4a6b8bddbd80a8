"""Distributed differential privacy: every client adds a share of the noise, and the server sees only the sum.

The distributed discrete Gaussian (Kairouz, Liu & Steinke 2021, arXiv 2102.06387, Algorithms 1 and 2), without the random rotation, on codes
instead of updates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedlight.core.errors import ConfigurationError, require, require_counts
from fedlight.privacy.accounting import discrete_sum_multiplier
from fedlight.privacy.mechanism import PrivacyMechanism
from fedlight.privacy.noise import NoiseSource

TAIL = 10.0
"""Room for a share's noise in a code, in standard deviations: one draw in 10^23 is larger."""


class DistributedDP(PrivacyMechanism):
    """Every client clips its code, rounds it to a fine grid and adds its share of discrete Gaussian noise.

    Protects against the server too, if it sees only the sum (secure aggregation) and at least ``threshold`` clients of every cohort
    answer, of which at most ``colluding`` reveal their noise. The server sees who takes part, so there is no amplification by sampling,
    and any sampler works. The codec's float codes are rounded to integers of ``bits`` bits, which replaces its own quantization and
    determines a run's reported ratio.

    Args:
        threshold: least number of clients that must answer; with fewer, the round is repeated before anybody learns its sum.
        colluding: number of clients that may reveal their noise.
        noise_multiplier: standard deviation of the least noise in a sum, in units of ``clip``; calibrated if not given.
        grid: number of steps of the integer grid within ``clip``.
        bits: width of an entry of a client's message, including the noise's tail.
        terms: the other options of every mechanism, those of `PrivacyMechanism`; the accountant is ``auto``.

    Raises:
        ConfigurationError: if a number is out of range, or neither a multiplier nor a target is given.
    """

    relation = "replace one user's code by zeros"

    def __init__(
        self,
        clip: float,
        threshold: int,
        colluding: int = 0,
        noise_multiplier: float | None = None,
        *,
        grid: int = 1024,
        bits: int = 18,
        **terms: Any,
    ) -> None:
        super().__init__(clip, noise_multiplier, accountant="auto", **terms)
        require(0 <= colluding < threshold, f"Expected 0 <= `colluding` < `threshold` but got {colluding} and {threshold}")
        require_counts(grid=grid)
        require(2 <= bits <= 24, f"Expected `bits` in 2..24 but got {bits}")
        self.threshold = threshold
        self.colluding = colluding
        self.grid = grid
        self.bits = bits

    def settings(self) -> dict[str, Any]:
        """Return the configuration as plain data."""
        return super().settings() | {name: getattr(self, name) for name in ("threshold", "colluding", "grid", "bits")}

    @property
    def shares(self) -> int:
        """Number of clients whose noise counts."""
        return self.threshold - self.colluding

    def share_deviation(self, multiplier: float, bound: float) -> float:
        """Return the standard deviation of one client's share: ``multiplier * bound / sqrt(threshold - colluding)``."""
        return multiplier * bound / math.sqrt(self.shares)

    def check_noise(self) -> None:
        """Refuse codes without room for noise, grids on which sums of shares are not Gaussian, and cohorts that are always too small."""
        deviation = self.share_deviation(self.multiplier, self.grid)
        needed = math.ceil(math.log2(2 * (self.grid + TAIL * deviation) + 1))
        if self.setting.bits < needed:
            raise ConfigurationError(
                f"Expected `bits` >= {needed} for {self.grid} steps and shares of noise of {deviation:.4g} steps but got "
                f"{self.setting.bits}: raise `bits`, or lower `grid`"
            )
        if deviation < 0.5 or self.accounted(self.multiplier) < 0.999 * self.multiplier:
            raise ConfigurationError(
                f"Expected a `grid` on which noise of {deviation:.4g} steps a client adds up to a Gaussian but {self.grid} is too coarse: "
                "raise `grid`"
            )
        if self.setting.cohort < self.threshold:
            raise ConfigurationError(
                f"Expected cohorts of at least `threshold` clients ({self.threshold}) but they have {self.setting.cohort}: "
                "sample more clients, or lower `threshold`"
            )

    def accounted(self, multiplier: float) -> float:
        """Return the multiplier of a Gaussian that is as private as the sum of the shares that count."""
        return discrete_sum_multiplier(self.grid, self.share_deviation(multiplier, self.grid), self.shares, self.setting.length)

    def add_share(self, code: Tensor, bound: float, limit: int, source: NoiseSource) -> Tensor:
        """Return the code with the client's share, within the range of its width."""
        noise = torch.from_numpy(source.discrete(code.numel(), self.share_deviation(self.multiplier, bound)))
        return (code + noise).clamp(-limit, limit)

    def sum_deviation(self, unit: float, shares: int) -> float:
        """Return the standard deviation of a sum of ``shares`` shares."""
        return math.sqrt(shares) * self.share_deviation(self.multiplier, self.clip / unit)

    def least_clients(self, asked: int) -> int:
        """Return the threshold, or the run's own minimum if that is larger."""
        return max(asked, self.threshold)
