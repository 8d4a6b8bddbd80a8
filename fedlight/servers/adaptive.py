"""Adaptive optimizers at the server (Reddi et al. 2021, Adaptive Federated Optimization, arXiv 2003.00295, Algorithm 2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fedlight.core.errors import require


class AdaptiveServer(torch.optim.Optimizer, ABC):
    """Steps ``w -= lr * m / (sqrt(v) + tau)`` with a running mean ``m`` of the aggregates; subclasses define ``v``.

    Unlike torch's Adam there is no bias correction, and ``v`` starts at ``tau ** 2``.
    """

    def __init__(self, params: ParamsT, lr: float, beta1: float, tau: float, **more: float) -> None:
        for name, value in (("lr", lr), ("tau", tau)):
            require(value > 0, f"Expected `{name}` > 0 but got {value}")
        for name, value in (("beta1", beta1), ("beta2", more.get("beta2", 0.0))):
            require(0 <= value < 1, f"Expected `{name}` in [0, 1) but got {value}")
        super().__init__(params, {"lr": lr, "beta1": beta1, "tau": tau, **more})

    @abstractmethod
    def grow(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Update ``v`` in place with the aggregate's square."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step along the aggregate, which is the parameters' gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["m"] = torch.zeros_like(parameter)
                    state["v"] = torch.full_like(parameter, group["tau"] ** 2)
                state["m"].lerp_(parameter.grad, 1 - group["beta1"])
                self.grow(state["v"], parameter.grad.square(), group)
                parameter.addcdiv_(state["m"], state["v"].sqrt().add_(group["tau"]), value=-group["lr"])
        return loss


class FedAdagrad(AdaptiveServer):
    """``v`` is the sum of all squares; no momentum, as in the paper.

    Args:
        params: the global model's parameters.
        lr: server learning rate; the paper searches it for every task.
        beta1: decay of the running mean of aggregates.
        tau: least denominator, the degree of adaptivity.
    """

    def __init__(self, params: ParamsT, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(params, lr, beta1, tau)

    def grow(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Add the square."""
        v.add_(square)


class FedAdam(AdaptiveServer):
    """``v`` is a running mean of squares.

    Args:
        params: the global model's parameters.
        lr: server learning rate; the paper searches it for every task.
        beta1: decay of the running mean of aggregates.
        beta2: decay of the running mean of squares.
        tau: least denominator, the degree of adaptivity.
    """

    def __init__(self, params: ParamsT, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        super().__init__(params, lr, beta1, tau, beta2=beta2)

    def grow(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Move ``v`` toward the square by a share."""
        v.lerp_(square, 1 - group["beta2"])


class FedYogi(FedAdam):
    """``v`` moves toward the squares by ``1 - beta2`` of a square, whatever its own size (Zaheer et al. 2018, Yogi)."""

    def grow(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Move ``v`` toward the square by a share of the square."""
        v.addcmul_(square, torch.sign(v - square), value=-(1 - group["beta2"]))
