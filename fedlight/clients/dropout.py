"""Dropout of a client's model that draws from a generator of its own: the numbers of torch's, whatever other threads draw meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def own_dropout(network: nn.Module) -> torch.Generator:
    """Have every ``nn.Dropout`` of a network on the CPU draw from the generator returned, in place; subclasses stay as they are."""
    generator = torch.Generator()
    for layer in network.modules():
        if type(layer) is nn.Dropout:
            layer.__class__ = OwnDropout  # the layer stays the same object, with its options and hooks
            layer.__dict__["generator"] = generator
    return generator


class OwnDropout(nn.Dropout):
    """Draws what torch's layer draws on the CPU, from ``generator`` instead of the process's own."""

    generator: torch.Generator

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with entries left out and the others lengthened, of the same shape."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
        return x.mul_(kept) if self.inplace else x * kept
