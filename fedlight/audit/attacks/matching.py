"""Attacks that search for images whose encoded update matches the observation.

- DLG: Zhu et al. 2019 (arXiv 1906.08935), Algorithm 1: L-BFGS on the squared difference.
- Inverting gradients: Geiping et al. 2020 (arXiv 2003.14053), Eq. 4: cosine distance, Adam on signs, total variation.
- Several local steps: the guess goes through the client's own steps (Geiping et al. 2020, section 6; Dimitrov et al. 2022,
  arXiv 2202.12395).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlight.audit.attacks.analytic import LastLayerLabels
from fedlight.audit.attacks.base import Attack, Case, Guess
from fedlight.audit.priors import Pixels, Prior, TotalVariation
from fedlight.core.errors import require, require_choice, require_counts

Labels = Literal["known", "inferred", "joint"]


def squared(predicted: Tensor, seen: Tensor) -> Tensor:
    """Return the squared difference, relative to the observation."""
    return (predicted - seen).square().sum() / seen.square().sum().clamp(min=1e-30)


def cosine(predicted: Tensor, seen: Tensor) -> Tensor:
    """Return one minus the cosine."""
    return 1 - F.cosine_similarity(predicted, seen, dim=0, eps=1e-30)


class GradientMatching(Attack):
    """What the searches share: coordinates, labels, the loss of a guess, and the choice of the best of several starts by loss."""

    unroll = False

    def __init__(self, steps: int, restarts: int, labels: Labels, prior: Prior | None, quick_steps: int) -> None:
        require_counts(steps=steps, restarts=restarts)
        require_choice("labels", labels, ("known", "inferred", "joint"))
        self.steps = steps
        self.restarts = restarts
        self.labels = labels
        self.prior = prior or Pixels()
        self._quick_steps = quick_steps

    def shortened(self) -> Self:
        """Return a copy with fewer steps and a single start."""
        short = copy.copy(self)
        short.steps, short.restarts = min(self.steps, self._quick_steps), 1
        return short

    def check(self, case: Case) -> None:
        """Refuse labels that cannot be inferred."""
        if self.labels == "inferred":
            LastLayerLabels().check(case)

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the images, and the labels if they were not known, of the start with the smallest final loss."""
        best, found = float("inf"), Guess()
        inferred = LastLayerLabels().run(case, generator).labels if self.labels == "inferred" else None
        granted = case.labels if inferred is None else inferred.view_as(case.labels)
        for _ in range(self.restarts):
            latent = self.prior.start(case.count, generator).to(case.seen.device).requires_grad_()
            logits = 0.1 * torch.randn(case.count, case.context.classes, generator=generator, dtype=torch.float64)
            soft = logits.to(case.seen.device).requires_grad_() if self.labels == "joint" else None
            end = self.search(case, latent, soft, granted)
            if end < best or found.images is None:
                labels = soft.argmax(1).detach() if soft is not None else inferred
                best, found = end, Guess(self.prior.images(latent).detach(), labels)
        return found

    def loss(self, case: Case, latent: Tensor, soft: Tensor | None, labels: Tensor) -> Tensor:
        """Return how badly a guess explains the observation, plus the prior's penalty."""
        images = self.prior.images(latent)
        images = images.view(*labels.shape, *images.shape[1:])
        targets = labels if soft is None else soft.softmax(1).view(*labels.shape, -1)
        if case.view.linear:
            updates = case.victim.mean_update(images, targets, self.unroll)[None]
        else:
            updates = case.victim.updates(images, targets, self.unroll)
        return self.distance(case.view.predict(updates), case.seen) + self.prior.penalty(latent)

    def distance(self, predicted: Tensor, seen: Tensor) -> Tensor:
        """Return the distance of a prediction from the observation, 0-d: 1 where it explains nothing."""
        return squared(predicted, seen)

    @abstractmethod
    def search(self, case: Case, latent: Tensor, soft: Tensor | None, labels: Tensor) -> float:
        """Optimize ``latent`` (and ``soft`` labels) in place, and return the final loss."""


class DLG(GradientMatching):
    """Deep leakage from gradients: L-BFGS on the squared difference between the observation and what the guess would send.

    Args:
        steps: iterations of L-BFGS.
        restarts: number of starts; the one with the smallest loss counts.
        labels: `known`, `inferred` (iDLG's, from the last layer), or `joint` (searched for with the images).
        prior: what the attacker knows about images (nothing if not given).
    """

    def __init__(self, steps: int = 600, restarts: int = 3, labels: Labels = "known", prior: Prior | None = None) -> None:
        super().__init__(steps, restarts, labels, prior, quick_steps=120)

    def search(self, case: Case, latent: Tensor, soft: Tensor | None, labels: Tensor) -> float:
        """Run L-BFGS with a strong-Wolfe line search."""
        searched = [latent] if soft is None else [latent, soft]
        optimizer = torch.optim.LBFGS(
            searched, max_iter=self.steps, history_size=50, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )
        last = float("inf")

        def closure() -> Tensor:
            nonlocal last
            loss = self.loss(case, latent, soft, labels)
            for variable, gradient in zip(searched, torch.autograd.grad(loss, searched), strict=True):
                variable.grad = gradient
            last = float(loss.detach())
            return loss.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return float(self.loss(case, latent, soft, labels).detach())


class FedAvgInversion(DLG):
    """DLG through the client's local steps: the guess goes through the same training, and the attack compares whole updates."""

    unroll = True


class InvertingGradients(GradientMatching):
    """Cosine distance, total variation, and Adam on the signs of gradients; slow by nature: a short run shows nothing.

    Args:
        steps: steps of Adam, 4,800 at least in the authors' experiments, and 24,000 in most.
        lr: learning rate of Adam, in gray values; divided by ten after 3/8, 5/8 and 7/8 of the steps.
        restarts: number of starts; the one with the smallest loss counts.
        labels: `known`, `inferred` (iDLG's, from the last layer), or `joint` (searched for with the images).
        prior: what the attacker knows about images (total variation of weight 1e-4 if not given).
    """

    quick = False

    def __init__(self, steps: int = 4800, lr: float = 0.1, restarts: int = 1, labels: Labels = "known", prior: Prior | None = None) -> None:
        super().__init__(steps, restarts, labels, prior or TotalVariation(1e-4), quick_steps=steps)
        require(lr > 0, f"Expected `lr` > 0 but got {lr}")
        self.lr = lr

    def distance(self, predicted: Tensor, seen: Tensor) -> Tensor:
        """Return one minus the cosine."""
        return cosine(predicted, seen)

    def search(self, case: Case, latent: Tensor, soft: Tensor | None, labels: Tensor) -> float:
        """Run Adam on signs, and keep pixels in 0..1."""
        searched = [latent] if soft is None else [latent, soft]
        optimizer = torch.optim.Adam(searched, lr=self.lr)
        milestones = [self.steps * part // 8 for part in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
        for _ in range(self.steps):
            gradients = torch.autograd.grad(self.loss(case, latent, soft, labels), searched)
            for variable, gradient in zip(searched, gradients, strict=True):
                variable.grad = gradient.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                self.prior.project(latent)
        return float(self.loss(case, latent, soft, labels).detach())
