"""The mathematics of the metrics, as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlight.core.errors import ConfigurationError, require


def relative_error(decoded: Tensor, true: Tensor) -> Tensor:
    """Return ``||decoded - true|| / ||true||`` ``[...]`` of updates ``[..., dim]``: 0 is perfect, 1 is no better than sending nothing.

    If both are zero the error is 0; if only ``true`` is zero it is inf.

    Raises:
        ConfigurationError: if the shapes differ.

    >>> relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(0.8000)
    """
    decoded, true = _floats(decoded, true)
    return ratio_of_norms(_norm(decoded - true), _norm(true))


def cosine(decoded: Tensor, true: Tensor) -> Tensor:
    """Return the cosine of the angle between updates ``[..., dim]``, ``[...]`` in [-1, 1]; 0 where either is zero.

    Raises:
        ConfigurationError: if the shapes differ.

    >>> cosine(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(0.6000)
    """
    decoded, true = _floats(decoded, true)
    dot = (_unit(decoded) * _unit(true)).sum(-1)
    return dot.clamp(-1.0, 1.0)


def explained(decoded: Tensor, true: Tensor) -> Tensor:
    """Return the explained share of ``||true||^2``, ``1 - relative_error^2``, of updates ``[..., dim]``, as ``[...]``.

    1 is perfect; a negative value is worse than sending nothing.

    Raises:
        ConfigurationError: if the shapes differ.

    >>> explained(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(0.3600)
    """
    return 1.0 - relative_error(decoded, true).square()


def spread(correct: Tensor, total: Tensor, worst: float = 0.1) -> dict[str, Tensor]:
    """Return the spread of accuracy over clients, from counts of correct and of all predictions ``[clients]``.

    Clients count equally, except those without samples, which do not count. The keys are ``mean``, ``std`` (of the population) and
    ``worst``, the mean over the least accurate ``ceil(worst * clients)``; all are nan if no client has a sample (the statistics of Li et
    al. 2020, arXiv 1905.10497).

    Raises:
        ConfigurationError: if the shapes differ or ``worst`` is not in (0, 1].

    >>> spread(torch.tensor([9, 5, 0]), torch.tensor([10, 10, 0]), worst=0.5)
    {'mean': tensor(0.7000), 'std': tensor(0.2000), 'worst': tensor(0.5000)}
    """
    if correct.shape != total.shape or correct.ndim != 1:
        raise ConfigurationError(
            f"Expected `correct` and `total` of one shape [clients] but got {list(correct.shape)} and {list(total.shape)}"
        )
    require(0 < worst <= 1, f"Expected `worst` to be a share of the clients in (0, 1] but got {worst}")
    seen = total > 0
    accuracy = correct[seen] / total[seen]
    # 0.1 * 70 is 7.000000000000001: rounding keeps the tail at 7 clients
    tail = math.ceil(round(worst * len(accuracy), 9))
    mean = accuracy.mean()
    return {"mean": mean, "std": (accuracy - mean).square().mean().sqrt(), "worst": accuracy.sort().values[:tail].mean()}


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


def ratio_of_norms(error: Tensor, norm: Tensor) -> Tensor:
    """Return ``error / norm``, elementwise, with 0 / 0 = 0.

    >>> ratio_of_norms(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))
    tensor([0.5000,    inf, 0.0000])
    """
    return torch.where(error == 0, torch.zeros_like(error), error / norm)


def _floats(decoded: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    if decoded.shape != true.shape or decoded.ndim == 0:
        raise ConfigurationError(
            f"Expected `decoded` and `true` of one shape [..., dim] but got {list(decoded.shape)} and {list(true.shape)}"
        )
    dtype = torch.float64 if torch.float64 in (decoded.dtype, true.dtype) else torch.float32
    return decoded.to(dtype), true.to(dtype)


def _norm(updates: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(updates, dim=-1)
    return norm


def _unit(updates: Tensor) -> Tensor:
    return ratio_of_norms(updates, _norm(updates).unsqueeze(-1))
