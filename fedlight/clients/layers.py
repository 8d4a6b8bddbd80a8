"""Layers of a client's model that stand in for torch's own, with the same numbers, bit for bit.

Max pooling on the CPU comes sooner (`tests/benchmarks/pooling.py`); dropout draws the same whatever other threads draw meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

LEAST_CHANNELS = 16
"""With fewer there is too little to compare at once to pay for pooling in another order in memory."""


def quicken_pooling(network: nn.Module) -> None:
    """Have every ``nn.MaxPool2d`` of a network pool with `MaxPool2d`, in place; subclasses stay as they are."""
    _replace(network, nn.MaxPool2d, MaxPool2d)


def own_dropout(network: nn.Module) -> torch.Generator:
    """Have every ``nn.Dropout`` of a network on the CPU draw from the generator returned, in place; subclasses stay as they are."""
    generator = torch.Generator()
    for layer in _replace(network, nn.Dropout, OwnDropout):
        layer.__dict__["generator"] = generator
    return generator


def _replace(network: nn.Module, kind: type[nn.Module], by: type[nn.Module]) -> list[nn.Module]:
    """Make layers of just this kind ones of another, in place, and return them: they stay the same objects, with options and hooks."""
    layers = [layer for layer in network.modules() if type(layer) is kind]
    for layer in layers:
        layer.__class__ = by
    return layers


class MaxPool2d(nn.MaxPool2d):
    """Takes maxima with channels last: torch then compares many numbers at once, where channels come first one by one.

    Gradients are scattered with channels first, which is faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return maxima ``[n, channels, height', width']`` of ``x`` ``[n, channels, height, width]``; other inputs take torch's way."""
        suits = x.dim() == 4 and x.shape[1] >= LEAST_CHANNELS and x.is_cpu and x.is_contiguous() and not self.return_indices
        if not suits or torch._C._are_functorch_transforms_active():  # torch.func knows torch's own layer alone
            pooled: Tensor = super().forward(x)
            return pooled
        windows = [list(_pair(option)) for option in (self.kernel_size, self.stride, self.padding, self.dilation)]
        pooled = _ChannelsLast.apply(x, [*windows, self.ceil_mode])
        return pooled


class _ChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: list[Any]) -> Tensor:
        maxima, indices = torch.ops.aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *options)
        ctx.save_for_backward(x, indices.contiguous())
        ctx.options = options
        pooled: Tensor = maxima.contiguous()
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, indices = ctx.saved_tensors
        scattered: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.options, indices)
        return scattered, None


class OwnDropout(nn.Dropout):
    """Draws what torch's layer draws on the CPU, from ``generator`` instead of the process's own."""

    generator: torch.Generator

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with entries left out and the others lengthened, of the same shape."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
        return x.mul_(kept) if self.inplace else x * kept
