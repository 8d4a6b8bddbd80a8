"""Clients that fall silent in the middle of a round, at will: for simulations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlight.core.errors import ConfigurationError
from fedlight.core.random import numpy_generator

STAGES = ("advertise", "share", "masked", "consistency", "unmask")
"""The stages of secure aggregation at which a client can fail to answer."""


@dataclass(frozen=True)
class DropOuts:
    """Which clients of an attempt fall silent, and from which stage on; drawn from seed, round and attempt alone.

    Args:
        clients: So many clients of every cohort fall silent, each at a stage drawn evenly.
        advertise: Probability that a client does not even send its keys.
        share: Probability that it sends keys and no shares.
        masked: Probability that it shares and sends no code.
        consistency: Probability that its code arrives and it does not sign the survivors.
        unmask: Probability that it signs and does not help to unmask.
        seed: Seed of the schedule.

    Raises:
        ConfigurationError: if a number is out of range.
    """

    clients: int = 0
    advertise: float = 0.0
    share: float = 0.0
    masked: float = 0.0
    consistency: float = 0.0
    unmask: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clients < 0 or any(not 0 <= getattr(self, stage) <= 1 for stage in STAGES):
            raise ConfigurationError(f"Expected `clients` >= 0 and probabilities in [0, 1] but got {self}")

    def draw(self, round: int, attempt: int, cohort: Sequence[int]) -> dict[int, str]:
        """Return the first stage that each client that falls silent does not answer.

        >>> DropOuts(clients=2).draw(0, 0, [4, 7, 9]) == DropOuts(clients=2).draw(0, 0, [4, 7, 9])
        True
        """
        silent: dict[int, str] = {}
        for client in map(int, cohort):
            draws = numpy_generator(self.seed, "drop-out", round, attempt, client).random(len(STAGES))
            first = next((stage for stage, draw in zip(STAGES, draws, strict=True) if draw < getattr(self, stage)), None)
            silent |= {client: first} if first else {}
        if self.clients:
            generator = numpy_generator(self.seed, "drop-outs", round, attempt)
            chosen = generator.choice(sorted(map(int, cohort)), min(self.clients, len(cohort)), replace=False)
            for client, stage in zip(chosen.tolist(), generator.integers(len(STAGES), size=len(chosen)).tolist(), strict=True):
                silent.setdefault(client, STAGES[stage])
        return silent
