"""Central differential privacy: clients clip, a trusted server adds the noise to the sum of codes.

DP-FedAvg with fixed-denominator averages (McMahan et al. 2018, arXiv 1710.06963, Algorithm 1), on codes instead of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError, require
from fedlight.privacy.clipping import move_clip, split_noise
from fedlight.privacy.mechanism import PrivacyMechanism


@dataclass
class AdaptiveClipping:
    """A clipping norm that follows a quantile of the clients' norms (Andrew et al. 2021, arXiv 1905.03871).

    Args:
        quantile: target share of clients with codes within the norm.
        rate: speed of the norm (on a logarithmic scale).
        bit_noise: standard deviation of the noise on the count of clients within the norm; a twentieth of the cohort if not given.
    """

    quantile: float = 0.5
    rate: float = 0.2
    bit_noise: float | None = None

    def __post_init__(self) -> None:
        require(0 < self.quantile < 1, f"Expected `quantile` between 0 and 1 but got {self.quantile}")
        require(self.rate > 0, f"Expected `rate` > 0 but got {self.rate}")
        require(self.bit_noise is None or self.bit_noise > 0, f"Expected `bit_noise` > 0 but got {self.bit_noise}")


class CentralDP(PrivacyMechanism):
    """Clients clip their codes; the trusted server adds Gaussian noise to their sum (discrete on integer codes).

    Protects against everybody who sees models and aggregates, not against the server. Needs cohorts that clients join independently
    (`Poisson`, or `Everyone`): the results on amplification by fixed-size cohorts use another neighboring relation.

    Args:
        adaptive: makes the norm follow a quantile of the clients' norms, starting at ``clip`` (fixed if not given).
        terms: the other options of every mechanism, those of `PrivacyMechanism`.

    Raises:
        ConfigurationError: if a number is out of range, or neither a multiplier nor a target is given.
    """

    relation = "add or remove one user"
    needs_rate = True
    amplified = True

    def __init__(
        self, clip: float, noise_multiplier: float | None = None, *, adaptive: AdaptiveClipping | None = None, **terms: Any
    ) -> None:
        super().__init__(clip, noise_multiplier, **terms)
        self.adaptive = adaptive
        self.sends_bits = adaptive is not None

    def settings(self) -> dict[str, Any]:
        """Return the configuration as plain data."""
        return super().settings() | ({"adaptive": vars(self.adaptive)} if self.adaptive else {})

    @property
    def bit_deviation(self) -> float:
        """Standard deviation of the noise on the sum of clipping bits."""
        assert self.adaptive is not None
        return self.adaptive.bit_noise or self.setting.cohort / 20

    @property
    def code_multiplier(self) -> float:
        """The noise multiplier on the codes: slightly more than ``multiplier`` if clipping bits are released too."""
        return split_noise(self.multiplier, self.bit_deviation) if self.adaptive else self.multiplier

    def check_noise(self) -> None:
        """Refuse clipping bits that would spend the whole budget alone."""
        if self.adaptive and self.code_multiplier == float("inf"):
            raise ConfigurationError(
                f"Expected `bit_noise` above half the noise multiplier ({self.multiplier:.4g}) but it is {self.bit_deviation:.4g}: "
                "sample larger cohorts, or leave `adaptive` out"
            )

    def broadcast(self) -> dict[str, Any]:
        """Return the next round's norm, if it is adaptive."""
        return {"clip": self.norm} if self.adaptive else {}

    def sum_noise(self, length: int, unit: float, context: Context) -> Tensor:
        """Return the noise of a sum, in units of the code."""
        source = self.source(context)
        draw = source.discrete if self.setting.integer else source.gaussian
        return torch.from_numpy(draw(length, self.sum_deviation(unit, 0)))

    def bit_noise(self, context: Context) -> float:
        """Return the noise on the sum of clipping bits."""
        return float(self.source(context, client=-2).gaussian(1, self.bit_deviation)[0]) if self.adaptive else 0.0

    def sum_deviation(self, unit: float, shares: int) -> float:
        """Return the noise's standard deviation, which does not depend on the number of clients."""
        return self.code_multiplier * self.norm / unit

    def least_clients(self, asked: int) -> int:
        """Return 0: whether a round takes place must not depend on its clients."""
        return 0

    def record_release(self, bits: float) -> None:
        """Record the release, and move the norm."""
        super().record_release(bits)
        if self.adaptive:
            inside = bits / self.setting.cohort + 0.5
            self.norm = move_clip(self.norm, min(max(inside, 0.0), 1.0), self.adaptive.quantile, self.adaptive.rate)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        super().load_state_dict(state)
        self.norm = self.norm if self.adaptive else self.clip
