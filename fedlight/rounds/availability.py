"""Which of the invited clients answer: drop-outs, stragglers, and over-selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError, require, require_least
from fedlight.core.random import numpy_generator

STAGES = ("advertise_keys", "share_keys", "train", "consistency_check", "unmasking")
"""The stages of secure aggregation at which a client can fall silent."""


class Availability(ABC):
    """Decides which invited clients' messages arrive in time; the others download the model, and nothing that they send counts.

    Law: whether a client answers depends on (seed, round, attempt, client) and, with `FirstToAnswer`, on the invited clients.
    """

    @property
    def independent(self) -> bool:
        """Whether a client's answer is independent of the other invited clients, as amplification by sampling needs."""
        return False

    @abstractmethod
    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the invited ``clients`` ``[cohort]`` that answer, int64, in order; ``work`` ``[cohort]`` is their number of samples."""

    def silent_from(self, clients: np.ndarray, work: np.ndarray, context: Context, stages: Sequence[str]) -> dict[int, str]:
        """Return, of each client that falls silent, the first of the aggregation's ``stages`` that it does not answer."""
        present = set(self.present(clients, work, context).tolist())
        return {client: stages[0] for client in clients.tolist() if client not in present}


class Full(Availability):
    """Every invited client answers."""

    independent = True

    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return all clients."""
        return clients


class DropOut(Availability):
    """Every client fails to answer with the same probability, independently in every attempt.

    Args:
        probability: probability that a client drops out, in [0, 1).
    """

    independent = True

    def __init__(self, probability: float = 0.3) -> None:
        require(0 <= probability < 1, f"Expected `probability` in [0, 1) but got {probability}")
        self.probability = probability

    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the clients that did not drop out."""
        draws = [_stream(context, client, "drop-out").random() for client in clients.tolist()]
        return clients[np.array(draws) >= self.probability] if draws else clients


class Times:
    """The time that clients take: a log-normal speed per client, log-normal noise per round, and a fixed start.

    Args:
        seconds_per_sample: median over clients of the time for one sample of local training.
        spread: standard deviation over clients of the logarithm of their speed.
        noise: standard deviation over rounds of the logarithm of a client's time.
        start: seconds that every answer takes in addition to training, such as transfers.
    """

    def __init__(self, seconds_per_sample: float = 0.01, spread: float = 0.5, noise: float = 0.2, start: float = 1.0) -> None:
        require(seconds_per_sample > 0, f"Expected `seconds_per_sample` > 0 but got {seconds_per_sample}")
        self.seconds_per_sample = seconds_per_sample
        self.spread = spread
        self.noise = noise
        self.start = start
        require_least(self, spread=0, noise=0, start=0)

    def seconds(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the time of each client, float64 ``[cohort]``."""
        own = [numpy_generator(context.seed, client, "speed").normal() for client in clients.tolist()]
        now = [_stream(context, client, "time").normal() for client in clients.tolist()]
        slowness = np.exp(self.spread * np.array(own) + self.noise * np.array(now))
        return self.start + self.seconds_per_sample * work * slowness


class Deadline(Availability):
    """The server waits for ``seconds`` and continues with the clients that answered: slow clients with much data rarely count.

    Args:
        seconds: time that the server waits.
        times: the time that clients take (a median of 10 ms per sample, with spread, if not given).
    """

    independent = True

    def __init__(self, seconds: float, times: Times | None = None) -> None:
        require(seconds > 0, f"Expected `seconds` > 0 but got {seconds}")
        self.seconds = seconds
        self.times = times or Times()

    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the clients that answer in time."""
        return clients[self.times.seconds(clients, work, context) <= self.seconds]


class FirstToAnswer(Availability):
    """The server invites more clients than it needs (``data.sampler``) and takes the first to answer (Bonawitz et al. 2019).

    Args:
        count: number of answers to take (arXiv 1902.01046, section 9, invites 130 % of them).
        times: the time that clients take (a median of 10 ms per sample, with spread, if not given).
    """

    def __init__(self, count: int, times: Times | None = None) -> None:
        require(count >= 1, f"Expected `count` >= 1 but got {count}")
        self.count = count
        self.times = times or Times()

    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the fastest clients."""
        first = np.argsort(self.times.seconds(clients, work, context), kind="stable")[: self.count]
        return clients[np.sort(first)]


@dataclass(frozen=True)
class StageDropOut(Availability):
    """Clients fall silent in the middle of secure aggregation; where a code is all that is sent, before it or not at all.

    Args:
        clients: So many clients of every cohort fall silent, each at a stage drawn evenly.
        advertise_keys: Probability that a client does not even send its keys.
        share_keys: Probability that it sends keys and no shares.
        train: Probability that it shares and sends no code.
        consistency_check: Probability that its code arrives and it does not sign the survivors.
        unmasking: Probability that it signs and does not help to unmask.
        seed: Seed of the schedule, in the place of the run's: the same clients fall silent whatever the run draws.

    Raises:
        ConfigurationError: if a number is out of range.
    """

    clients: int = 0
    advertise_keys: float = 0.0
    share_keys: float = 0.0
    train: float = 0.0
    consistency_check: float = 0.0
    unmasking: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.clients < 0 or any(not 0 <= getattr(self, stage) <= 1 for stage in STAGES):
            raise ConfigurationError(f"Expected `clients` >= 0 and probabilities in [0, 1] but got {self}")

    @property
    def independent(self) -> bool:
        """Whether no fixed number of clients is drawn."""
        return not self.clients

    def draw(self, round: int, attempt: int, cohort: Sequence[int], seed: int = 0) -> dict[int, str]:
        """Return the first stage that each client that falls silent does not answer, in a run of this seed.

        >>> StageDropOut(clients=2).draw(0, 0, [4, 7, 9]) == StageDropOut(clients=2).draw(0, 0, [4, 7, 9])
        True
        """
        silent: dict[int, str] = {}
        seed = seed if self.seed is None else self.seed
        for client in map(int, cohort):
            draws = numpy_generator(seed, "drop-out", round, attempt, client).random(len(STAGES))
            first = next((stage for stage, draw in zip(STAGES, draws, strict=True) if draw < getattr(self, stage)), None)
            silent |= {client: first} if first else {}
        if self.clients:
            generator = numpy_generator(seed, "drop-outs", round, attempt)
            chosen = generator.choice(sorted(map(int, cohort)), min(self.clients, len(cohort)), replace=False)
            for client, stage in zip(chosen.tolist(), generator.integers(len(STAGES), size=len(chosen)).tolist(), strict=True):
                silent.setdefault(client, STAGES[stage])
        return silent

    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the clients that send a code."""
        silent = self.silent_from(clients, work, context, ("train",))
        return np.array([client for client in clients.tolist() if client not in silent], dtype=np.int64)

    def silent_from(self, clients: np.ndarray, work: np.ndarray, context: Context, stages: Sequence[str]) -> dict[int, str]:
        """Return the stages as drawn; a stage that the aggregation does not have counts as the next one that it has."""
        drawn = self.draw(context.round, context.attempt, clients.tolist(), context.seed)
        found = {client: next((s for s in STAGES[STAGES.index(stage) :] if s in stages), None) for client, stage in drawn.items()}
        return {client: stage for client, stage in found.items() if stage is not None}


class Several(Availability):
    """Several models in order, each applied to the clients that answer under the previous one, such as `DropOut`, then `FirstToAnswer`.

    Args:
        parts: the models of availability, in order.
    """

    def __init__(self, parts: Sequence[Availability]) -> None:
        self.parts = list(parts)

    @property
    def independent(self) -> bool:
        """Whether it holds for all parts."""
        return all(part.independent for part in self.parts)

    def present(self, clients: np.ndarray, work: np.ndarray, context: Context) -> np.ndarray:
        """Return the clients that answer under all parts."""
        for part in self.parts:
            left = part.present(clients, work, context)
            clients, work = left, work[np.isin(clients, left)]
        return clients

    def silent_from(self, clients: np.ndarray, work: np.ndarray, context: Context, stages: Sequence[str]) -> dict[int, str]:
        """Return the earliest stage that any part names; who does not answer at all meets no further part."""
        silent: dict[int, str] = {}
        for part in self.parts:
            here = np.array([silent.get(client) != stages[0] for client in clients.tolist()], dtype=bool)
            for client, stage in part.silent_from(clients[here], work[here], context, stages).items():
                silent[client] = min(stage, silent.get(client, stage), key=list(stages).index)
        return silent


def _stream(context: Context, client: int, purpose: str) -> np.random.Generator:
    return numpy_generator(context.seed, context.round, context.attempt, client, purpose)
