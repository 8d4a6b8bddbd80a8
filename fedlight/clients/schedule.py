"""Learning-rate schedules over rounds: a factor on the client's learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from fedlight.core.errors import require, require_counts


class Schedule(ABC):
    """A factor on the client learning rate that depends only on the round, so that a resumed run continues it."""

    @abstractmethod
    def factor(self, round: int) -> float:
        """Return the factor in this round (counted from 0)."""


class Constant(Schedule):
    """The same learning rate in every round."""

    def factor(self, round: int) -> float:
        """Return 1."""
        return 1.0


class Exponential(Schedule):
    """Multiplies the learning rate by ``decay`` after every round.

    Args:
        decay: factor per round, in (0, 1].
    """

    def __init__(self, decay: float = 0.99) -> None:
        require(0 < decay <= 1, f"Expected `decay` in (0, 1] but got {decay}")
        self.decay = decay

    def factor(self, round: int) -> float:
        """Return ``decay ** round``."""
        return self.decay**round


class Cosine(Schedule):
    """Falls along half a cosine from 1 to ``final`` over ``rounds`` rounds, then stays there.

    Args:
        rounds: number of rounds until the final factor is reached.
        final: the final factor, in [0, 1].
    """

    def __init__(self, rounds: int, final: float = 0.0) -> None:
        require_counts(rounds=rounds)
        require(0 <= final <= 1, f"Expected `final` in [0, 1] but got {final}")
        self.rounds = rounds
        self.final = final

    def factor(self, round: int) -> float:
        """Return the factor in this round."""
        progress = min(round / self.rounds, 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
