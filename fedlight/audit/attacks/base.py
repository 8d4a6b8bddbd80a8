"""The attack interface: from an observation to a guess at the images."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from fedlight.audit.priors import Pixels, Prior
from fedlight.audit.victim import Victim
from fedlight.audit.views import View


@dataclass(frozen=True)
class Auxiliary:
    """The attacker's auxiliary data: images ``[n, c, h, w]`` in 0..1, labels ``[n]``, and how many classes there are."""

    images: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True)
class Case:
    """One problem for an attack: the model, the view, the observation ``seen``, and what else the attacker knows.

    Attacks with ``labels: known`` may use ``labels`` ``[clients, batch]``; their shape gives the number of images.
    """

    victim: Victim
    view: View
    seen: Tensor
    labels: Tensor
    context: Auxiliary

    @property
    def count(self) -> int:
        """Number of images to find."""
        return self.labels.numel()

    @property
    def deviation(self) -> Tensor:
        """Known standard deviation of the observation ``[length]`` around its expectation."""
        return self.view.deviation(self.seen, len(self.labels))


@dataclass(frozen=True)
class Guess:
    """What an attack comes back with: images ``[n, c, h, w]``, labels ``[n]``, or both; their order means nothing."""

    images: Tensor | None = None
    labels: Tensor | None = None


class Attack(ABC):
    """An attack: options in the constructor, ``prepare`` once on public data, ``run`` on every case.

    Attributes:
        quick: whether a fast audit runs it, shortened.
        needs_gradients: whether it differentiates through the view.
    """

    quick: bool = True
    needs_gradients: bool = True
    prior: Prior = Pixels()

    @property
    def name(self) -> str:
        """What the report calls it."""
        return type(self).__name__

    def prepare(self, context: Auxiliary, generator: torch.Generator) -> Self:
        """Return a copy with its prior fitted to public images."""
        prepared = copy.copy(self)
        prepared.prior = self.prior.fit(context.images, context.labels, generator)
        return prepared

    def shortened(self) -> Self:
        """Return a copy with the budget of a fast audit."""
        return copy.copy(self)

    def tamper(self, victim: Victim, context: Auxiliary) -> nn.Module | None:
        """Return the network that a malicious server sends instead of the victim's, or None to send the victim's."""
        return None

    def check(self, case: Case) -> None:  # noqa: B027  (many attacks work on everything)
        """Raise ``ConfigurationError`` if the attack cannot run on this case."""

    @abstractmethod
    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the guess; every draw comes from ``generator``."""
