"""The error of decoded aggregated updates, over many rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fedlight.core.errors import ConfigurationError
from fedlight.metrics.functional import ratio_of_norms


class ReconstructionError(Metric):
    """Relative error over all updates, ``sqrt(sum ||decoded - true||^2 / sum ||true||^2)``, so that large updates count most.

    States: ``squared_error`` and ``squared_norm``, float32 0-d, summed over processes.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.

    >>> metric = ReconstructionError()
    >>> metric.update(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    >>> metric.compute()
    tensor(0.8000)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    squared_error: Tensor
    squared_norm: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("squared_error", default=torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("squared_norm", default=torch.zeros(()), dist_reduce_fx="sum")

    def update(self, decoded: Tensor, true: Tensor) -> None:
        """Add one or several updates ``[..., dim]``; raises ``ConfigurationError`` if the shapes differ."""
        if decoded.shape != true.shape:
            raise ConfigurationError(f"Expected `decoded` and `true` of one shape but got {list(decoded.shape)} and {list(true.shape)}")
        true = true.float()
        self.squared_error += (decoded.float() - true).square().sum()
        self.squared_norm += true.square().sum()

    def compute(self) -> Tensor:
        """Return the relative error, float32 0-d: 0 before the first update, inf if only the true updates are zero."""
        return ratio_of_norms(self.squared_error, self.squared_norm).sqrt()
