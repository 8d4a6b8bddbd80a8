"""Dropout with its own generator: the same numbers as torch's dropout, independent of what other threads draw."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def own_dropout(network: nn.Module) -> torch.Generator:
    """Make every ``nn.Dropout`` of a network on the CPU draw from the returned generator, in place; subclasses are unchanged."""
    generator = torch.Generator()
    for layer in network.modules():
        if type(layer) is nn.Dropout:
            layer.__class__ = OwnDropout  # the layer stays the same object, with its options and hooks
            layer.__dict__["generator"] = generator
    return generator


class OwnDropout(nn.Dropout):
    """Draws the same numbers as torch's layer on the CPU, from ``generator`` instead of the process's generator."""

    generator: torch.Generator

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with some entries set to zero and the others scaled up, in the same shape."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
        return x.mul_(kept) if self.inplace else x * kept
