"""Which clients take part in a round: a function of (seed, round, attempt) only."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from fedlight.core.errors import ConfigurationError, require
from fedlight.core.random import numpy_generator


class ClientSampler(ABC):
    """Draws the cohort of a round.

    Law: the cohort depends only on the arguments of `sample`, so every process, and a resumed run, gets the same one.
    """

    @abstractmethod
    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        """Return the distinct client ids of a cohort, sorted, int64 ``[cohort]`` in ``0..num_clients - 1``."""

    def validate(self, num_clients: int) -> None:  # noqa: B027  (most samplers serve any population)
        """Raise ConfigurationError if cohorts cannot be drawn from ``num_clients`` clients."""


class Uniform(ClientSampler):
    """A cohort of fixed size, uniformly at random without replacement (McMahan et al. 2017); memory O(cohort).

    Args:
        cohort_size: Number of clients in every round.
    """

    def __init__(self, cohort_size: int = 10) -> None:
        require(cohort_size >= 1, f"cohort_size: expected at least 1, got {cohort_size}.")
        self.cohort_size = cohort_size

    def validate(self, num_clients: int) -> None:
        """Raise ConfigurationError if the cohort is larger than the population."""
        if self.cohort_size > num_clients:
            raise ConfigurationError(
                f"cohort_size: cohort larger than the population: expected at most {num_clients}, got {self.cohort_size}; "
                "lower cohort_size, raise num_clients, or sample Everyone."
            )

    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        """Return ``cohort_size`` client ids; raises ConfigurationError if there are fewer clients."""
        self.validate(num_clients)
        return _without_replacement(num_clients, self.cohort_size, numpy_generator(seed, "cohort", round, attempt))


class Poisson(ClientSampler):
    """Each client independently with probability ``rate``; the cohort may be empty.

    Privacy accounting of subsampled mechanisms assumes this sampling (Abadi et al. 2016, arXiv 1607.00133). It draws a
    binomial size and then that many clients, which has the same distribution in memory O(cohort).

    Args:
        rate: Probability that a client takes part in a round, above 0 and at most 1.
    """

    def __init__(self, rate: float) -> None:
        require(0 < rate <= 1, f"rate: expected a probability above 0 and at most 1, got {rate}.")
        self.rate = rate

    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        """Return the clients that take part, ``rate * num_clients`` of them on average."""
        rng = numpy_generator(seed, "cohort", round, attempt)
        return _without_replacement(num_clients, int(rng.binomial(num_clients, self.rate)), rng)


class Everyone(ClientSampler):
    """All clients in every round."""

    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        """Return all client ids."""
        return np.arange(num_clients, dtype=np.int64)


def _without_replacement(population: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(population, size=count, replace=False, shuffle=False)).astype(np.int64)
