"""The clients' computation as an attacker repeats it: updates as differentiable functions of images and labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlight.core.layout import Layout

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits ``[n, classes]`` and targets (labels ``[n]`` or probabilities ``[n, classes]``) to a mean loss."""


@dataclass(frozen=True)
class Pixels:
    """The public constants that turn images in 0..1 into a network's inputs, ``[1, channels, 1, 1]`` each."""

    shift: Tensor
    scale: Tensor

    def inputs(self, images: Tensor) -> Tensor:
        """Return the inputs ``[n, c, h, w]`` of images ``[n, c, h, w]``."""
        return (images - self.shift.to(images)) / self.scale.to(images)

    def images(self, inputs: Tensor) -> Tensor:
        """Return the images in 0..1 of inputs."""
        return inputs * self.scale.to(inputs) + self.shift.to(inputs)


class Victim:
    """A client's computation at known global weights, in float64: full-batch SGD steps on its images, and what it sends.

    The network runs without dropout and with BatchNorm's global statistics, which favors the attacker: it does not know a client's random
    draws. Every step uses all of a client's images.
    """

    def __init__(self, network: nn.Module, loss: Loss, pixels: Pixels, lr: float = 0.1, steps: int = 1) -> None:
        self.network = copy.deepcopy(network).double().eval()
        self.loss = loss
        self.pixels = pixels
        self.lr = lr
        self.steps = steps
        self.layout = Layout.of(self.network)
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in self.network.named_parameters() if p.requires_grad}

    def update(self, images: Tensor, targets: Tensor, unroll: bool = True) -> Tensor:
        """Return the update ``[dim]`` (float64) of one client with images ``[n, c, h, w]`` in 0..1; differentiable if they are.

        Without ``unroll`` the local steps count as one long step, as an attack on single gradients assumes.
        """
        graph = images.requires_grad or targets.requires_grad
        weights, total = self.weights, torch.zeros((), dtype=torch.float64, device=images.device)
        steps = self.steps if unroll else 1
        lr = self.lr if unroll else self.lr * self.steps
        inputs = self.pixels.inputs(images.double())
        if targets.is_floating_point():
            targets = targets.double()
        for _ in range(steps):
            loss = self.loss(functional_call(self.network, weights, (inputs,)), targets)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=graph, materialize_grads=True)
            total = total + lr * torch.cat([grad.reshape(-1) for grad in grads])
            if steps > 1:
                moved = [w - lr * g for w, g in zip(weights.values(), grads, strict=True)]
                weights = {n: m if graph else m.detach().requires_grad_() for n, m in zip(weights, moved, strict=True)}
        return total if graph else total.detach()

    def updates(self, images: Tensor, targets: Tensor, unroll: bool = True) -> Tensor:
        """Return the updates ``[clients, dim]`` of images ``[clients, n, c, h, w]`` and targets ``[clients, n, ...]``."""
        return torch.stack([self.update(x, y, unroll) for x, y in zip(images, targets, strict=True)])

    def mean_update(self, images: Tensor, targets: Tensor, unroll: bool = True) -> Tensor:
        """Return the mean of ``updates`` ``[dim]``: in one pass if clients of equal size take one step."""
        if self.steps == 1 or not unroll:
            return self.update(images.flatten(0, 1), targets.flatten(0, 1), unroll)
        return self.updates(images, targets, unroll).mean(0)

    def bytes_per_image(self, images: Tensor) -> int:
        """Return the bytes that autograd saves in a forward and backward pass with a graph, for one image ``[1, c, h, w]``."""
        kept = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size() if tensor.grad_fn is not None else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            x = images[:1].clone().requires_grad_()
            loss = self.loss(
                functional_call(self.network, self.weights, (self.pixels.inputs(x.double()),)), torch.zeros(1).long().to(x.device)
            )
            torch.autograd.grad(loss, list(self.weights.values()), create_graph=True, materialize_grads=True)
        return kept


class ManyRounds(Victim):
    """The same clients in several rounds, at known global models: updates ``[rounds * dim]`` lie one behind the other.

    What is not an update (layout, network) is the first round's.
    """

    def __init__(self, rounds: list[Victim]) -> None:
        first = rounds[0]
        super().__init__(first.network, first.loss, first.pixels, first.lr, first.steps)
        self.rounds = rounds

    def update(self, images: Tensor, targets: Tensor, unroll: bool = True) -> Tensor:
        """Return the updates ``[rounds * dim]`` of one client."""
        return torch.cat([victim.update(images, targets, unroll) for victim in self.rounds])

    def bytes_per_image(self, images: Tensor) -> int:
        """Return the bytes of all rounds."""
        return sum(victim.bytes_per_image(images) for victim in self.rounds)
