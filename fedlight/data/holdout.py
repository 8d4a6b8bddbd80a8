"""The part of a training set that is held out from clients, as proxy and validation data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlight.core.errors import ConfigurationError, require
from fedlight.core.random import numpy_generator
from fedlight.data.splits import stratified_choice

_LEAST_PROXY = 200  # least number of proxy samples for a fraction of a small data set


@dataclass(frozen=True)
class HoldOut:
    """How much of the training set to hold out: see the arguments of `FederatedDataModule` with the same names."""

    proxy_fraction: float = 0.05
    proxy_samples: int | None = None
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("proxy_fraction", "val_fraction"):
            require(0 <= getattr(self, name) < 1, f"{name}: expected a share of at least 0 and below 1, got {getattr(self, name)}.")
        if self.proxy_samples is not None and self.proxy_samples < 0:
            raise ConfigurationError(f"proxy_samples: expected 0 or more, or null, got {self.proxy_samples}.")

    def proxy_size(self, samples: int) -> int:
        """Return the number of proxy samples to take from ``samples``."""
        if self.proxy_samples is not None:
            return self.proxy_samples
        return max(_LEAST_PROXY, round(self.proxy_fraction * samples)) if self.proxy_fraction > 0 else 0

    def split(self, labels: np.ndarray, proxy: bool, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return sorted indices (clients, proxy, validation), disjoint and stratified by label.

        Raises:
            ConfigurationError: no samples would be left for the clients.
        """
        held = self.proxy_size(len(labels)) if proxy else 0
        val = max(1, round(self.val_fraction * len(labels))) if self.val_fraction > 0 else 0
        if held + val >= len(labels):
            raise ConfigurationError(
                f"proxy_samples: expected samples for clients among the {len(labels)} training samples, got {held} proxy and "
                f"{val} validation samples; set a smaller proxy_samples or val_fraction."
            )
        kept = np.arange(len(labels))
        parts = []
        for name, count in (("proxy", held), ("val", val)):
            chosen = stratified_choice(labels[kept], count, numpy_generator(seed, "data", name))
            parts.append(kept[chosen])
            kept = np.delete(kept, chosen)
        return kept, parts[0], parts[1]
