"""How to split a training set over clients: with label skew, size skew, or neither; see `natural` for given clients."""

from __future__ import annotations

import math

import numpy as np

from fedlight.core.errors import ConfigurationError, require
from fedlight.data.partitioner import Partitioner
from fedlight.data.splits import cut, shuffle_within

_DRAWS = 10  # draws of Dirichlet before moving samples


class IID(Partitioner):
    """A uniformly random split into clients of equal size (to within one sample)."""

    by_label = False

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Deal shuffled samples to clients in turn."""
        return rng.permutation(np.arange(len(labels), dtype=np.int64) % num_clients)


class Dirichlet(Partitioner):
    """Label skew: each class is spread over the clients in proportions drawn from Dirichlet(alpha).

    The construction of Yurochkin et al. 2019 (arXiv 1905.12022); Hsu et al. 2019 (arXiv 1909.06335) draw each client's
    class mix instead. If a client has fewer than ``min_samples`` the whole draw is repeated, up to ten times; then the
    draw that lacks the fewest samples is repaired by moving random samples from the largest clients.

    Args:
        alpha: Concentration above 0: a small value gives one class per client, a large value IID.
        min_samples: Least number of samples per client.
    """

    def __init__(self, alpha: float = 0.5, min_samples: int = 1) -> None:
        super().__init__(min_samples)
        self.alpha = _positive("alpha", alpha)

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Return the first draw with enough samples for every client, else the closest of ten."""
        best, least = np.empty(0, dtype=np.int64), math.inf
        counts = np.unique(labels, return_counts=True)[1]
        for _ in range(_DRAWS):
            candidate = self._draw(labels, counts, num_clients, rng)
            lacking = int(np.maximum(self.min_samples - np.bincount(candidate, minlength=num_clients), 0).sum())
            if lacking < least:
                best, least = candidate, lacking
            if lacking == 0:
                break
        return best

    def _draw(self, labels: np.ndarray, counts: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        order = shuffle_within(labels, rng)
        parts = [cut(int(count), rng.dirichlet(np.full(num_clients, self.alpha))) for count in counts]
        assignment = np.empty(len(labels), dtype=np.int64)
        assignment[order] = np.concatenate(parts)
        return assignment


class Shards(Partitioner):
    """Few labels per client: samples sorted by label are cut into equal shards, each client gets some (McMahan et al. 2017).

    A shard no longer than the rarest class spans at most two labels, so a client has at most ``2 * shards_per_client``.

    Args:
        shards_per_client: Number of shards per client.
        min_samples: Least number of samples per client.
    """

    def __init__(self, shards_per_client: int = 2, min_samples: int = 1) -> None:
        super().__init__(min_samples)
        require(shards_per_client >= 1, f"shards_per_client: expected at least 1, got {shards_per_client}.")
        self.shards_per_client = shards_per_client

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Deal the shards at random; raises an error, instead of mixing labels, if shards are too short."""
        shards = num_clients * self.shards_per_client
        least = self.shards_per_client * (len(labels) // shards)
        if least < self.min_samples:
            raise ConfigurationError(
                f"num_clients: {shards} shards of {len(labels)} samples leave a client {least}, expected at least {self.min_samples}; "
                "lower num_clients, shards_per_client or min_samples."
            )
        owners = rng.permutation(shards) // self.shards_per_client
        assignment = np.empty(len(labels), dtype=np.int64)
        assignment[shuffle_within(labels, rng)] = owners[np.arange(len(labels)) * shards // len(labels)]
        return assignment


class QuantitySkew(Partitioner):
    """Clients of unequal size, sizes in proportions drawn from Dirichlet(alpha), labels mixed.

    Args:
        alpha: Concentration above 0: a small value gives a few large clients, a large value equal sizes.
        min_samples: Least number of samples per client; the largest clients fill up smaller ones.
    """

    by_label = False

    def __init__(self, alpha: float = 1.0, min_samples: int = 1) -> None:
        super().__init__(min_samples)
        self.alpha = _positive("alpha", alpha)

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Cut the shuffled samples by the drawn proportions."""
        return rng.permutation(cut(len(labels), rng.dirichlet(np.full(num_clients, self.alpha))))


def _positive(name: str, value: float) -> float:
    require(math.isfinite(value) and value > 0, f"{name}: expected a finite number above 0, got {value}.")
    return float(value)
