"""Accuracy of each client, and its spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fedlight.core.errors import ConfigurationError, require
from fedlight.metrics.functional import spread


class ClientSpread(Metric):
    """The spread of accuracy over clients: ``mean``, ``std`` and ``worst`` of `fedlight.metrics.spread`.

    States: ``correct`` and ``total``, int64 ``[num_clients]``, summed over processes.

    Args:
        num_clients: clients in the federation.
        worst: share of clients, the least accurate ones, in the mean ``worst``.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ConfigurationError: if ``num_clients`` is less than 1 or ``worst`` is not in (0, 1].

    >>> metric = ClientSpread(num_clients=2)
    >>> metric.update(torch.tensor([1, 1, 2, 0]), torch.tensor([1, 0, 2, 0]), torch.tensor([0, 0, 1, 1]))
    >>> metric.compute()
    {'mean': tensor(0.7500), 'std': tensor(0.2500), 'worst': tensor(0.5000)}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    correct: Tensor
    total: Tensor

    def __init__(self, num_clients: int, worst: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(num_clients >= 1, f"Expected `num_clients` >= 1 but got {num_clients}")
        require(0 < worst <= 1, f"Expected `worst` to be a share of the clients in (0, 1] but got {worst}")
        self.num_clients = num_clients
        self.worst = worst
        self.add_state("correct", default=torch.zeros(num_clients, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros(num_clients, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, targets: Tensor, clients: Tensor) -> None:
        """Count predicted labels, true labels and the clients they belong to, each integer ``[samples]``.

        Raises:
            ConfigurationError: if the shapes differ or a client is not in ``0 .. num_clients - 1``.
        """
        if not predicted.shape == targets.shape == clients.shape or clients.ndim != 1:
            raise ConfigurationError(
                "Expected `predicted`, `targets` and `clients` of one shape [samples] but got "
                f"{list(predicted.shape)}, {list(targets.shape)} and {list(clients.shape)}"
            )
        if clients.numel() and not (clients.min() >= 0 and clients.max() < self.num_clients):
            raise ConfigurationError(
                f"Expected `clients` in 0 .. {self.num_clients - 1} but got {int(clients.min())} .. {int(clients.max())}: "
                "raise `num_clients`"
            )
        self.total += torch.bincount(clients, minlength=self.num_clients)
        self.correct += torch.bincount(clients[predicted == targets], minlength=self.num_clients)

    def compute(self) -> dict[str, Tensor]:
        """Return ``mean``, ``std`` and ``worst`` over the clients seen so far, float32 0-d."""
        return spread(self.correct, self.total, self.worst)
