"""Layers of a client's model that replace torch's, with the same results, bit for bit.

Max pooling is faster on the CPU (`tests/benchmarks/pooling.py`); dropout draws the same numbers regardless of other threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

LEAST_CHANNELS = 16
"""With fewer channels the gain does not pay for the change of memory order."""


def quicken_pooling(network: nn.Module) -> None:
    """Make every ``nn.MaxPool2d`` of a network a `MaxPool2d`, in place; subclasses are unchanged."""
    _replace(network, nn.MaxPool2d, MaxPool2d)


def own_dropout(network: nn.Module) -> torch.Generator:
    """Make every ``nn.Dropout`` of a network on the CPU draw from the returned generator, in place; subclasses are unchanged."""
    generator = torch.Generator()
    for layer in _replace(network, nn.Dropout, OwnDropout):
        layer.__dict__["generator"] = generator
    return generator


def _replace(network: nn.Module, kind: type[nn.Module], by: type[nn.Module]) -> list[nn.Module]:
    """Turn layers of exactly this class into another, in place, and return them: the same objects, with their options and hooks."""
    layers = [layer for layer in network.modules() if type(layer) is kind]
    for layer in layers:
        layer.__class__ = by
    return layers


class MaxPool2d(nn.MaxPool2d):
    """Takes maxima with channels last, where torch compares many numbers at once; with channels first it compares one by one.

    Gradients are scattered with channels first, which is faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return maxima ``[n, channels, height', width']`` of ``x`` ``[n, channels, height, width]``; other inputs use torch's layer."""
        suits = x.dim() == 4 and x.shape[1] >= LEAST_CHANNELS and x.is_cpu and x.is_contiguous() and not self.return_indices
        if not suits or torch._C._are_functorch_transforms_active():  # torch.func supports only torch's layer
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
    """Draws the same numbers as torch's layer on the CPU, from ``generator`` instead of the process's generator."""

    generator: torch.Generator

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with some entries set to zero and the others scaled up, in the same shape."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
        return x.mul_(kept) if self.inplace else x * kept
