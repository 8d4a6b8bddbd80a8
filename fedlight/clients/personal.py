"""Normalization layers that stay on the client (FedBN, Li et al. 2021, arXiv 2102.07623)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedlight.core.codec import State
from fedlight.core.layout import Layout, flatten, float_buffers


class PersonalNorm:
    """Keeps weights and statistics of BatchNorm layers in the client's state; their part of the update is zero.

    Attributes:
        index: positions ``[personal]`` of those weights in the flat vector.
    """

    def __init__(self, module: nn.Module) -> None:
        owned = {
            f"{path}.{name}" if path else name
            for path, layer in module.named_modules()
            if isinstance(layer, _BatchNorm)
            for name, _ in layer.named_parameters(recurse=False)
        }
        layout = Layout.of(module)
        spans = [
            torch.arange(offset, offset + size)
            for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True)
            if name in owned
        ]
        self.index = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def restore(self, state: State, weights: Tensor, buffers: Tensor) -> tuple[Tensor, Tensor]:
        """Return global weights ``[dim]`` and buffers ``[buffer_dim]`` with the client's own layers, if it has any yet."""
        if "norm_weights" not in state:
            return weights, buffers
        mixed = weights.clone()
        mixed[self.index] = state["norm_weights"].to(weights)
        return mixed, state["norm_buffers"].to(buffers)

    def keep(self, state: State, weights: Tensor, buffers: Tensor, update: Tensor) -> None:
        """Move the client's own layers from the trained weights and buffers to its state, and out of the update."""
        state["norm_weights"] = weights[self.index].cpu()
        state["norm_buffers"] = buffers.clone().cpu()
        update[self.index] = 0


def personal_forward(network: nn.Module, personal: PersonalNorm, state: State, x: Tensor) -> Tensor:
    """Return the network's output for ``x`` with a client's own normalization layers (the global ones, if it has none)."""
    named = dict(network.named_parameters())
    weights, buffers = flatten(named[name] for name in Layout.of(network).names), flatten(float_buffers(network))
    return forward_with(network, *personal.restore(state, weights, buffers.to(weights)), x)


def forward_with(network: nn.Module, weights: Tensor, buffers: Tensor, x: Tensor) -> Tensor:
    """Return the network's output for ``x`` with other weights ``[dim]`` and buffers ``[buffer_dim]``."""
    layout = Layout.of(network)
    tensors = dict(zip(layout.names, layout.split(weights), strict=True))
    floats = [(name, b) for name, b in network.named_buffers() if b.is_floating_point()]
    pieces = torch.split(buffers, [b.numel() for _, b in floats])
    tensors |= {name: piece.view(b.shape) for (name, b), piece in zip(floats, pieces, strict=True)}
    output: Tensor = torch.func.functional_call(network, tensors, (x,))
    return output
