"""Attacks that search for the images which best explain the observation: maximum a posteriori (MAP) estimates.

The misfit of a guess is the negative log likelihood of the observation: half the sum of squared residuals, each divided by the
*known* standard deviation of rounding or noise. A prior adds its own negative log density; nothing is left to be weighed by hand.

- DLG: Zhu et al. 2019 (arXiv 1906.08935), Algorithm 1: L-BFGS on the squared difference.
- As an estimate under known noise: Balunovic et al. 2022 (arXiv 2111.04706).
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

from fedlight.audit.attacks.base import Attack, Case, Guess
from fedlight.audit.attacks.public import ClassModel, likely_images
from fedlight.audit.priors import Pixels, Prior, TotalVariation
from fedlight.core.errors import require, require_choice, require_counts, require_positive

Labels = Literal["known", "inferred", "joint"]


def weighed_misfit(predicted: Tensor, seen: Tensor, deviation: Tensor) -> Tensor:
    """Return half the sum of squared residuals in standard deviations, 0-d: the negative log likelihood, up to a constant.

    >>> float(weighed_misfit(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0])))
    0.5
    """
    misfit: Tensor = 0.5 * ((predicted - seen) / deviation).square().sum()
    return misfit


class GradientMatching(Attack):
    """What the searches share: starts, labels, the loss of a guess, and the choice of the best of several starts by loss.

    Every other start, the first one included, is at public images that together explain the observation well; the others near the
    middle of the prior.
    """

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
        """Return a copy with fewer steps and at most two starts."""
        short = copy.copy(self)
        short.steps, short.restarts = min(self.steps, self._quick_steps), min(self.restarts, 2)
        return short

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the images, and the labels if they were not known, of the start with the smallest final loss."""
        best, found = float("inf"), Guess()
        likely = ClassModel.of(case).likeliest(case.count) if self.labels != "known" else case.labels.flatten()
        prior = self.prior if self.labels == "joint" else self.prior.given(likely)
        for number in range(self.restarts):
            middle = prior.start(case.count, generator).to(case.seen.device)
            latent = (middle if number % 2 else prior.latent(likely_images(case, likely, generator))).requires_grad_()
            logits = 0.1 * torch.randn(case.count, case.context.classes, generator=generator, dtype=torch.float64)
            soft = logits.to(case.seen.device).requires_grad_() if self.labels == "joint" else None
            end = self.search(case, prior, latent, soft, likely.view_as(case.labels))
            if end < best or found.images is None:
                labels = soft.argmax(1).detach() if soft is not None else likely if self.labels == "inferred" else None
                best, found = end, Guess(prior.images(latent).detach(), labels)
        return found

    def loss(self, case: Case, prior: Prior, latent: Tensor, soft: Tensor | None, labels: Tensor) -> Tensor:
        """Return how badly a guess explains the observation, plus the prior's penalty."""
        images = prior.images(latent)
        images = images.view(*labels.shape, *images.shape[1:])
        targets = labels if soft is None else soft.softmax(1).view(*labels.shape, -1)
        if case.view.linear:
            updates = case.victim.mean_update(images, targets, self.unroll)[None]
        else:
            updates = case.victim.updates(images, targets, self.unroll)
        return self.objective(case.view.predict(updates), case, prior, latent)

    def objective(self, predicted: Tensor, case: Case, prior: Prior, latent: Tensor) -> Tensor:
        """Return the negative log posterior, 0-d, up to a constant."""
        return weighed_misfit(predicted, case.seen, case.deviation) + prior.penalty(latent)

    @abstractmethod
    def search(self, case: Case, prior: Prior, latent: Tensor, soft: Tensor | None, labels: Tensor) -> float:
        """Optimize ``latent`` (and ``soft`` labels) in place, and return the final loss."""


class DLG(GradientMatching):
    """Deep leakage from gradients: L-BFGS on the difference between the observation and what the guess would send.

    Args:
        steps: iterations of L-BFGS.
        restarts: number of starts; the one with the smallest loss counts.
        labels: `known`, `inferred` (by likelihood, from public images), or `joint` (searched for with the images).
        prior: what the attacker knows about images (nothing if not given).
    """

    def __init__(self, steps: int = 600, restarts: int = 4, labels: Labels = "known", prior: Prior | None = None) -> None:
        super().__init__(steps, restarts, labels, prior, quick_steps=200)

    def search(self, case: Case, prior: Prior, latent: Tensor, soft: Tensor | None, labels: Tensor) -> float:
        """Run L-BFGS with a strong-Wolfe line search."""
        searched = [latent] if soft is None else [latent, soft]
        optimizer = torch.optim.LBFGS(
            searched, max_iter=self.steps, history_size=50, tolerance_grad=1e-14, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            loss = self.loss(case, prior, latent, soft, labels)
            for variable, gradient in zip(searched, torch.autograd.grad(loss, searched), strict=True):
                variable.grad = gradient
            return loss.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return float(self.loss(case, prior, latent, soft, labels).detach())


class FedAvgInversion(DLG):
    """DLG through the client's local steps: the guess goes through the same training, and the attack compares whole updates."""

    unroll = True


class InvertingGradients(GradientMatching):
    """Cosine distance, total variation, and Adam on the signs of gradients; slow by nature: a short run shows nothing.

    The cosine is that of observation and prediction in standard deviations.

    Args:
        steps: steps of Adam, 4,800 at least in the authors' experiments, and 24,000 in most.
        lr: learning rate of Adam, in gray values; divided by ten after 3/8, 5/8 and 7/8 of the steps.
        restarts: number of starts; the one with the smallest loss counts.
        labels: `known`, `inferred` (by likelihood, from public images), or `joint` (searched for with the images).
        prior: what the attacker knows about images (total variation if not given).
        weight: weight of the prior's penalty for a coordinate; a cosine has no scale that would tell it.
    """

    quick = False

    def __init__(
        self,
        steps: int = 4800,
        lr: float = 0.1,
        restarts: int = 1,
        labels: Labels = "known",
        prior: Prior | None = None,
        weight: float = 1e-5,
    ) -> None:
        super().__init__(steps, restarts, labels, prior or TotalVariation(), quick_steps=steps)
        require_positive(lr=lr)
        require(weight >= 0, f"Expected `weight` >= 0 but got {weight}")
        self.lr = lr
        self.weight = weight

    def objective(self, predicted: Tensor, case: Case, prior: Prior, latent: Tensor) -> Tensor:
        """Return one minus the cosine, plus the weighted penalty."""
        weighed, seen = predicted / case.deviation, case.seen / case.deviation
        return 1 - F.cosine_similarity(weighed, seen, dim=0, eps=1e-30) + self.weight * prior.penalty(latent) / latent.numel()

    def search(self, case: Case, prior: Prior, latent: Tensor, soft: Tensor | None, labels: Tensor) -> float:
        """Run Adam on signs, and keep pixels in 0..1."""
        searched = [latent] if soft is None else [latent, soft]
        optimizer = torch.optim.Adam(searched, lr=self.lr)
        milestones = [self.steps * part // 8 for part in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
        for _ in range(self.steps):
            gradients = torch.autograd.grad(self.loss(case, prior, latent, soft, labels), searched)
            for variable, gradient in zip(searched, gradients, strict=True):
                variable.grad = gradient.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                prior.project(latent)
        return float(self.loss(case, prior, latent, soft, labels).detach())
