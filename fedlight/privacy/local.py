"""Local differential privacy: every client adds the full noise itself (Kasiviswanathan et al. 2011, arXiv 0803.0924)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlight.core.errors import ConfigurationError
from fedlight.privacy.mechanism import PrivacyMechanism
from fedlight.privacy.noise import NoiseSource


class LocalDP(PrivacyMechanism):
    """Every client clips its code and adds Gaussian noise to it before sending; nobody has to be trusted.

    Codes of different data may differ by twice the norm, so a multiplier counts half as much as in central privacy, without
    amplification; accounting assumes that every client takes part in every round. Strong noise: only for very many clients.

    Args:
        noise_multiplier: standard deviation of one code's noise in units of ``clip``; calibrated to ``target_epsilon`` if not given.

    Raises:
        ConfigurationError: if a number is out of range, or neither a multiplier nor a target is given.
    """

    relation = "replace one user's data"

    def check_noise(self) -> None:
        """Refuse integer codes, which have no room for noise."""
        if self.setting.integer:
            raise ConfigurationError(
                "Expected a codec of float codes for LocalDP but its codes are integers, too narrow for a client's noise: leave the "
                "quantization out, or use CentralDP"
            )

    def accounted(self, multiplier: float) -> float:
        """Return half of the multiplier: replacing a client's data moves its code by up to twice the norm."""
        return multiplier / 2

    def add_share(self, code: Tensor, bound: float, limit: int, source: NoiseSource) -> Tensor:
        """Return the code with the full noise, in its own float type."""
        noise = torch.from_numpy(source.gaussian(code.numel(), self.multiplier * bound))
        return (code.cpu().double() + noise).to(code.dtype)

    def sum_deviation(self, unit: float, shares: int) -> float:
        """Return the standard deviation of the sum of ``shares`` clients' noise."""
        return math.sqrt(shares) * self.multiplier * self.clip / unit
