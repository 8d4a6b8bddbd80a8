"""The global model as the server's side of a round sees it; Lightning counts and saves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlight.core.buffers import counters, extras, statistics
from fedlight.core.layout import Layout, as_is, flatten, named_trainable
from fedlight.core.model import Model


class LightningModel:
    """Weights in a LightningModule, moved by the one optimizer that Lightning knows (a `GlobalModel`).

    Args:
        module: the module that owns optimizer and schedule.
        network: the global model, in the modes that clients train it in.
        steps: local steps of a client in a round, which BatchNorm's own counters count; nothing else reads these.
    """

    def __init__(self, module: LightningModule, network: nn.Module, steps: int = 1) -> None:
        self.module = module
        self.network = network
        self.steps = steps
        self.layout = Layout.of(network)
        self._statistics = statistics(network)
        self._counters = counters(network, counting=True)
        self._extras = extras(network)

    @property
    def device(self) -> torch.device:
        """Where sums are decoded."""
        return self.module.device

    def read(self) -> Model:
        """Return a copy of weights and buffers."""
        weights = flatten(trainable(self.network))
        return Model(weights, flatten(place.table[place.key] for place in self._statistics).to(weights.device))

    def extras(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of these extras."""
        found = {name: self._extras[name].get() for name in names}
        return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}

    def step(self, update: Tensor, buffers: Tensor | None, extras: Mapping[str, Tensor] | None = None) -> float:
        """Take one optimizer step, which is one `global_step`, then one of the schedule; return the step's learning rate."""
        optimizer, scheduler = self.module.optimizers(), self.module.lr_schedulers()
        for parameter, piece in zip(trainable(self.network), self.layout.split(update), strict=True):
            parameter.grad = as_is(piece, parameter)
        optimizer.step()  # type: ignore[union-attr]
        lr = float(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        own = [place.table[place.key] for place in self._statistics]
        if buffers is not None:
            for buffer, piece in zip(own, torch.split(buffers, [b.numel() for b in own]), strict=True):
                buffer.copy_(piece.view(buffer.shape))
        for place in self._counters:
            place.table[place.key].add_(self.steps if buffers is not None else 0)
        for name, value in (extras or {}).items():
            self._set(name, value.to(self.device))
        return lr

    def write(self, weights: Tensor) -> None:
        """Replace the weights ``[dim]``."""
        with torch.no_grad():
            for parameter, piece in zip(trainable(self.network), self.layout.split(weights), strict=True):
                parameter.copy_(piece)

    def _set(self, name: str, value: Tensor) -> None:
        """Put a new tensor in an extra's place: what was there is what clients put back, and stays as it is."""
        place = self._extras[name]
        held = place.get()
        if isinstance(held, nn.Parameter):
            held.data = value
        else:
            place.table[place.key] = value


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Return a network's trainable parameters, in the layout's order."""
    return [parameter for _, parameter in named_trainable(network)]
