"""The global model as the server's side of a round sees it; Lightning counts and saves it."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlight.core.layout import Layout, flatten, float_buffers
from fedlight.core.model import Model


class LightningModel:
    """Weights in a LightningModule, moved by the one optimizer that Lightning knows (a `GlobalModel`).

    Args:
        module: the module that owns optimizer and schedule.
        network: the global model.
    """

    def __init__(self, module: LightningModule, network: nn.Module) -> None:
        self.module = module
        self.network = network
        self.layout = Layout.of(network)

    @property
    def device(self) -> torch.device:
        """Where sums are decoded."""
        return self.module.device

    def read(self) -> Model:
        """Return a copy of weights and buffers."""
        weights = flatten(trainable(self.network))
        return Model(weights, flatten(float_buffers(self.network)).to(weights))

    def step(self, update: Tensor, buffers: Tensor | None) -> float:
        """Take one optimizer step, which is one `global_step`, then one of the schedule; return the step's learning rate."""
        optimizer, scheduler = self.module.optimizers(), self.module.lr_schedulers()
        for parameter, piece in zip(trainable(self.network), self.layout.split(update), strict=True):
            parameter.grad = piece.to(parameter)
        optimizer.step()  # type: ignore[union-attr]
        lr = float(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        if buffers is not None:
            own = float_buffers(self.network)
            for buffer, piece in zip(own, torch.split(buffers, [b.numel() for b in own]), strict=True):
                buffer.copy_(piece.view(buffer.shape))
        return lr

    def write(self, weights: Tensor) -> None:
        """Replace the weights ``[dim]``."""
        with torch.no_grad():
            for parameter, piece in zip(trainable(self.network), self.layout.split(weights), strict=True):
                parameter.copy_(piece)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Return a network's trainable parameters, in the layout's order."""
    return [p for p in network.parameters() if p.requires_grad]
