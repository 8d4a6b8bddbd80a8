"""Momentum at the server."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT


class FedAvgM(torch.optim.SGD):
    """SGD with heavy-ball momentum over the rounds' aggregates (Hsu et al. 2019, arXiv 1909.06335, section 4.3).

    Args:
        params: the global model's parameters.
        lr: server learning rate.
        momentum: share of the last step to repeat; 0 is FedAvg.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
