"""A network that learns from auxiliary pairs which image belongs to a code (after Wu et al. 2023, Learning to Invert, arXiv 2210.10880)."""

from __future__ import annotations

import copy
import weakref
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.audit.attacks.base import Attack, Case, Guess
from fedlight.audit.priors import small_network
from fedlight.audit.views import View
from fedlight.core.errors import require, require_counts
from fedlight.core.random import torch_generator


class LearnedInverter(Attack):
    """An MLP from observation and label to the image, trained on public images that the attacker encodes itself.

    It needs no gradients through the encoder, so it works on any codec. One image of one client only. If it is no better than
    the class mean, it has learned no more than the label.

    Args:
        width: units of the two hidden layers.
        steps: training steps of Adam.
        inputs: largest number of inputs; a random projection shortens longer codes to it.
        pairs: largest number of auxiliary pairs.
    """

    name = "learned inverter"
    needs_gradients = False

    def __init__(self, width: int = 256, steps: int = 2000, inputs: int = 1024, pairs: int = 4000) -> None:
        require_counts(width=width, steps=steps, inputs=inputs, pairs=pairs)
        self.width = width
        self.steps = steps
        self.inputs = inputs
        self.pairs = pairs
        self._trained: weakref.WeakKeyDictionary[View, tuple[nn.Module, Tensor, Tensor, Tensor | None]] = weakref.WeakKeyDictionary()

    def shortened(self) -> Self:
        """Return a copy with fewer steps and pairs."""
        short = copy.copy(self)
        short.steps, short.pairs = min(self.steps, 600), min(self.pairs, 600)
        short._trained = weakref.WeakKeyDictionary()
        return short

    def check(self, case: Case) -> None:
        """Refuse several images."""
        require(case.count <= 1, "the learned inverter is trained for one image of one client")

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the image for the observation; the network is trained once for each view."""
        if case.view not in self._trained:
            self._trained[case.view] = self._train(case)
        network, mean, scale, projection = self._trained[case.view]
        with torch.no_grad():
            image = network(_features(case.seen[None], case.labels.flatten(), case.context.classes, mean, scale, projection))
        return Guess(image.double().view(1, *case.context.images.shape[1:]))

    def _train(self, case: Case) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
        generator = torch_generator("audit", "inverter")
        images, labels = case.context.images[: self.pairs], case.context.labels[: self.pairs]
        seen = torch.stack(
            [case.view.observe(case.victim.update(x[None], y[None])[None], generator) for x, y in zip(images, labels, strict=True)]
        )
        projection = None
        if seen.shape[1] > self.inputs:
            projection = torch.randn(seen.shape[1], self.inputs, generator=generator, dtype=torch.float64).to(seen)
            projection /= seen.shape[1] ** 0.5
        projected = seen if projection is None else seen @ projection
        mean, scale = projected.mean(0), projected.std(0).clamp(min=1e-12 * float(projected.abs().max()) + 1e-30)
        features = _features(seen, labels, case.context.classes, mean, scale, projection)
        targets = images.flatten(1).float()
        network = small_network([features.shape[1], self.width, self.width, targets.shape[1]], generator).to(features)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(self.steps):
            rows = torch.randint(len(features), (64,), generator=generator).to(features.device)
            loss = F.mse_loss(network(features[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return network, mean, scale, projection


def _features(seen: Tensor, labels: Tensor, classes: int, mean: Tensor, scale: Tensor, projection: Tensor | None) -> Tensor:
    """Return standardized codes and one-hot labels ``[n, inputs + classes]``, float32."""
    projected = seen if projection is None else seen @ projection
    return torch.cat([((projected - mean) / scale).clamp(-10, 10), F.one_hot(labels, classes)], dim=1).float()
