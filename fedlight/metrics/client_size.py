"""Accuracy of small and of large clients."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy_by_size(correct: Tensor, total: Tensor, sizes: Tensor, groups: int = 4) -> dict[str, Tensor]:
    """Return the mean accuracy of each quarter of the clients by size, from counts and sizes ``[clients]``.

    Clients count equally, except those without evaluation samples, which do not count; the keys are ``size_1`` (the smallest clients) to
    ``size_4``, fewer if there are fewer clients.

    >>> accuracy_by_size(torch.tensor([1, 2]), torch.tensor([2, 2]), torch.tensor([50, 10]), groups=2)
    {'size_1': tensor(1.), 'size_2': tensor(0.5000)}
    """
    seen = torch.nonzero(total > 0).flatten()
    order = seen[torch.argsort(sizes[seen], stable=True)]
    accuracy = correct[order] / total[order]
    parts = torch.tensor_split(accuracy, max(1, min(groups, len(order))))
    return {f"size_{i}": part.mean() for i, part in enumerate(parts, start=1)}
