"""Which of the invited clients answer: drop-outs, stragglers, and more invited than needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlight.core.errors import require, require_least
from fedlight.core.random import numpy_generator


@dataclass(frozen=True)
class Attempt:
    """The attempt at a round that clients are invited to: what every draw is named by."""

    seed: int
    round: int
    attempt: int


class Availability(ABC):
    """Says which invited clients' messages arrive in time; the others download the model and send nothing that is counted.

    Law: whether a client answers depends on (seed, round, attempt, client) and, where the first to answer are taken, on who was invited.
    """

    @property
    def independent(self) -> bool:
        """Whether a client answers or not whoever else was invited, as amplification by sampling needs: False where nothing is said."""
        return False

    @abstractmethod
    def present(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return those of the invited ``clients`` ``[cohort]``, with ``work`` ``[cohort]`` samples to do, that answer: int64, in order."""


class Full(Availability):
    """Every invited client answers."""

    independent = True

    def present(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return all clients."""
        return clients


class DropOut(Availability):
    """Every client fails to answer with the same probability, independently in every attempt.

    Args:
        probability: of a client to drop out, in [0, 1).
    """

    independent = True

    def __init__(self, probability: float = 0.3) -> None:
        require(0 <= probability < 1, f"Expected `probability` in [0, 1) but got {probability}")
        self.probability = probability

    def present(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return the clients that did not drop out."""
        draws = [_stream(attempt, client, "drop-out").random() for client in clients.tolist()]
        return clients[np.array(draws) >= self.probability] if draws else clients


class Times:
    """How long clients take: log-normal speeds that belong to the client, log-normal noise of the round, and a fixed start.

    Args:
        seconds_per_sample: median over clients of the time for one sample of local training.
        spread: standard deviation over clients of the logarithm of their speed.
        noise: standard deviation over rounds of the logarithm of a client's time.
        start: seconds that every answer takes beside the training, such as the transfers.
    """

    def __init__(self, seconds_per_sample: float = 0.01, spread: float = 0.5, noise: float = 0.2, start: float = 1.0) -> None:
        require(seconds_per_sample > 0, f"Expected `seconds_per_sample` > 0 but got {seconds_per_sample}")
        self.seconds_per_sample = seconds_per_sample
        self.spread = spread
        self.noise = noise
        self.start = start
        require_least(self, spread=0, noise=0, start=0)

    def seconds(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return how long each client takes, float64 ``[cohort]``."""
        own = [numpy_generator(attempt.seed, client, "speed").normal() for client in clients.tolist()]
        now = [_stream(attempt, client, "time").normal() for client in clients.tolist()]
        slowness = np.exp(self.spread * np.array(own) + self.noise * np.array(now))
        return self.start + self.seconds_per_sample * work * slowness


class Deadline(Availability):
    """The server waits for so long and goes on with those that answered: slow clients of much data rarely count.

    Args:
        seconds: time that the server waits.
        times: how long clients take (a median of 10 ms a sample, with spread, if not given).
    """

    independent = True

    def __init__(self, seconds: float, times: Times | None = None) -> None:
        require(seconds > 0, f"Expected `seconds` > 0 but got {seconds}")
        self.seconds = seconds
        self.times = times or Times()

    def present(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return the clients that are in time."""
        return clients[self.times.seconds(clients, work, attempt) <= self.seconds]


class FirstToAnswer(Availability):
    """The server invites more clients than it needs (``data.sampler``) and takes those that answer first (Bonawitz et al. 2019).

    Args:
        count: how many answers it takes (arXiv 1902.01046, section 9, invites 130 % of them).
        times: how long clients take (a median of 10 ms a sample, with spread, if not given).
    """

    def __init__(self, count: int, times: Times | None = None) -> None:
        require(count >= 1, f"Expected `count` >= 1 but got {count}")
        self.count = count
        self.times = times or Times()

    def present(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return the fastest clients."""
        first = np.argsort(self.times.seconds(clients, work, attempt), kind="stable")[: self.count]
        return clients[np.sort(first)]


class Several(Availability):
    """One after another: those that the first lets through meet the second, such as `DropOut` and then `FirstToAnswer`.

    Args:
        parts: the models of availability, in order.
    """

    def __init__(self, parts: Sequence[Availability]) -> None:
        self.parts = list(parts)

    @property
    def independent(self) -> bool:
        """Whether that is so of all parts."""
        return all(part.independent for part in self.parts)

    def present(self, clients: np.ndarray, work: np.ndarray, attempt: Attempt) -> np.ndarray:
        """Return the clients that come through all parts."""
        for part in self.parts:
            left = part.present(clients, work, attempt)
            clients, work = left, work[np.isin(clients, left)]
        return clients


def _stream(attempt: Attempt, client: int, purpose: str) -> np.random.Generator:
    return numpy_generator(attempt.seed, attempt.round, attempt.attempt, client, purpose)
