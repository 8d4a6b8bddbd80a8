"""What autograd gives, as pieces of a flat vector: the one place that knows what kinds of gradient there are.

A gradient may be missing (the loss does not reach the parameter, or it has ceased to be trained), sparse (an embedding with
``sparse=True``), complex, or of any float type. Optimizers leave a parameter without a gradient alone: no decay, no momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlight.core.layout import Layout, as_is, as_real


def derivatives(loss: Tensor, seed: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the loss's gradient for each parameter as autograd makes it, None where the loss does not depend on it.

    They lie in the parameters' ``grad`` as well, as ``loss.backward()`` leaves them: hooks of parameters and checkpoints within the network
    do what they do there. ``seed`` (0-d, one) is the loss's derivative by itself.
    """
    for parameter in parameters:
        parameter.grad = None
    if any(parameter.requires_grad for parameter in parameters):
        # The checks of `backward` in Python would take a sixth of a small model's step.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    return [parameter.grad for parameter in parameters]


def piece(gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor of real numbers (a complex one as pairs ``[..., 2]``)."""
    return as_real(gradient.to_dense() if gradient.layout != torch.strided else gradient)


def flat_gradient(gradients: Sequence[Tensor]) -> Tensor:
    """Return gradients of any kind as one new vector ``[dim]``."""
    return torch.cat([piece(gradient).reshape(-1) for gradient in gradients]) if gradients else torch.empty(0)


def absent(layout: Layout, reached: Sequence[bool]) -> list[slice]:
    """Return the parts of a flat vector that belong to parameters without a gradient."""
    if all(reached):
        return []
    spans = zip(layout.offsets, layout.sizes, reached, strict=True)
    return [slice(offset, offset + size) for offset, size, there in spans if not there]


def put_piece(parameter: Tensor, mean: Tensor) -> None:
    """Make a flat piece the gradient of a parameter that has one: in its memory, or in its place if it is sparse."""
    held = parameter.grad
    assert held is not None
    made = as_is(mean.view(as_real(parameter).shape), parameter)
    if held.layout == torch.strided:
        held.copy_(made)
    else:  # rows of zeros stay out, which some optimizers leave alone
        parameter.grad = made.to_sparse(1)
