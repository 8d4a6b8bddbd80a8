"""Ending a run between two rounds: what a process was told by a signal, and what all processes of the run know of it."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import torch

from fedlight.rounds.reduce import reduce_sum

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The signals that end a run after its round."""


class Stop:
    """A request to stop. Processes tell each other with the sums of every pass, so that all of them stop after the same round.

    Attributes:
        asked: the signal that this process received, if any.
        agreed: the signal that some process had received when they last added up, if any: known to all of them.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.agreed: signal.Signals | None = None

    def votes(self) -> list[float]:
        """Return what this process adds to the sum over processes: one number a signal."""
        return [float(self.asked == number) for number in SIGNALS]

    def count(self, votes: Sequence[float]) -> None:
        """Take in the sum of all processes' votes."""
        self.agreed = next((number for number, vote in zip(SIGNALS, votes, strict=True) if vote), self.agreed)

    def agree(self, device: torch.device) -> None:
        """Add up the votes now, where no other sum is about to be; every process has to call this."""
        self.count(reduce_sum(torch.tensor(self.votes(), device=device)).tolist())
