"""Normalization layers that stay on the client (FedBN, Li et al. 2021, arXiv 2102.07623)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedlight.core.buffers import statistics
from fedlight.core.codec import State
from fedlight.core.layout import Layout, as_is, flatten, named_trainable, trainable


class PersonalNorm:
    """Keeps weights and statistics of BatchNorm layers in the client's state; their part of the update is zero."""

    def __init__(self, module: nn.Module) -> None:
        self.names = [place.name for place in statistics(module)]  # in the order of the buffers ``[buffer_dim]``
        layers = [(f"{path}." if path else "", layer) for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
        self.counters = {f"{prefix}num_batches_tracked" for prefix, _ in layers}  # which nobody else is told
        owned = {prefix + name for prefix, layer in layers for name, _ in layer.named_parameters(recurse=False)}
        layout = Layout.of(module)
        spans = [
            torch.arange(offset, offset + size)
            for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True)
            if name in owned
        ]
        self.index = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)  # in the flat vector, ``[personal]``

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
    held = dict(network.named_buffers())
    weights, buffers = flatten(trainable(network)), flatten(held[name] for name in personal.names)
    return forward_with(network, *personal.restore(state, weights, buffers.to(weights.device)), personal.names, x)


def forward_with(network: nn.Module, weights: Tensor, buffers: Tensor, names: Sequence[str], x: Tensor) -> Tensor:
    """Return the network's output for ``x`` with other weights ``[dim]`` and other statistics of these ``names`` ``[buffer_dim]``."""
    named, held = named_trainable(network), dict(network.named_buffers())
    pieces = Layout.of(network).split(weights)
    tensors = {name: as_is(piece, parameter) for (name, parameter), piece in zip(named, pieces, strict=True)}
    parts = torch.split(buffers, [held[name].numel() for name in names]) if names else ()
    tensors |= {name: part.view(held[name].shape) for name, part in zip(names, parts, strict=True)}
    output: Tensor = torch.func.functional_call(network, tensors, (x,))
    return output
