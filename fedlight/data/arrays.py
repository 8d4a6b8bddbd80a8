"""A data set as four checked tensors in memory, and their standardization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlight.core.errors import DataError

_CHUNK = 4096  # samples in float64 at a time for statistics


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set in memory; build it with `build_arrays`, which checks it.

    ``x_*``: ``[samples, ...]`` float32 (images ``[samples, channels, height, width]``); ``y_*``: ``[samples]`` int64;
    ``client_*``: ``[samples]`` natural client id of every sample, of any integer or string type, or None.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    client_train: np.ndarray | None = None
    client_test: np.ndarray | None = None


def build_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    num_classes: int | None = None,
    *,
    source: str,
    client_train: Any = None,
    client_test: Any = None,
) -> Arrays:
    """Convert and check the parts of a data set; ``num_classes`` None takes the largest label plus one.

    ``source`` names the file or data set in errors. Inputs are tensors or arrays; uint8 becomes ``value / 255`` with
    the channel axis first (see `to_features`).

    Raises:
        DataError: a part is empty, of another length, type or feature shape than expected, not finite, or a label is
            out of range.
    """
    x = [to_features(values, f"{source}: x_{split}") for split, values in (("train", x_train), ("test", x_test))]
    y = [_to_labels(values, f"{source}: y_{split}") for split, values in (("train", y_train), ("test", y_test))]
    clients = [None if values is None else np.array(values) for values in (client_train, client_test)]
    if num_classes is None:
        num_classes = 1 + max(int(labels.max()) if len(labels) else 0 for labels in y)
    for i, split in enumerate(("train", "test")):
        _check_split(x[i], y[i], clients[i], num_classes, split, source)
    if x[0].shape[1:] != x[1].shape[1:]:
        shapes = tuple(x[0].shape[1:]), tuple(x[1].shape[1:])
        raise DataError(f"{source}: expected x_train and x_test of one feature shape, got {shapes[0]} and {shapes[1]}; rebuild one.")
    return Arrays(x[0], y[0], x[1], y[1], num_classes, clients[0], clients[1])


def to_features(values: Any, name: str) -> Tensor:
    """Return ``values`` as finite float32 ``[samples, ...]``.

    Float values keep their shape. uint8 values are divided by 255, and images among them get their channel axis first:
    ``[n, h, w]`` and ``[n, h, w, c]`` (c 1 or 3, unless axis 1 already is 1 or 3) become ``[n, c, h, w]``.

    Raises:
        DataError: any other type, no feature axis, or a value that is not finite.
    """
    x = _tensor(values, name)
    if x.ndim < 2:
        raise DataError(f"{name}: expected [samples, ...] with at least one feature axis, got shape {tuple(x.shape)}.")
    if x.dtype == torch.uint8:
        if x.ndim == 3:
            x = x.unsqueeze(1)
        elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
            x = x.permute(0, 3, 1, 2)
        return x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if not x.is_floating_point():
        raise DataError(f"{name}: expected uint8 images or float features, got {x.dtype}; convert it to one of them.")
    x = x.to(torch.float32).contiguous()
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise DataError(f"{name}: expected finite values in float32, got {bad} NaN or infinite ones; clean or rescale the data.")
    return x


def standardize(arrays: Arrays) -> Arrays:
    """Return images with per-channel mean 0 and deviation 1 over ``x_train``; feature data (not 4-D) is unchanged.

    The statistics are computed in float64 over the whole training set, like the usual public constants of a data set;
    a constant channel is only centered.
    """
    if arrays.x_train.ndim != 4:
        return arrays
    shift, scale = shift_and_scale(arrays.x_train)
    return replace(arrays, x_train=(arrays.x_train - shift).div_(scale), x_test=(arrays.x_test - shift).div_(scale))


def shift_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `standardize` takes from images ``[n, c, h, w]`` and divides them by then, float32 ``[1, c, 1, 1]`` each.

    Mean and (population) deviation per channel, computed in float64.
    """
    count = x.numel() / x.shape[1]
    mean = torch.zeros(x.shape[1], dtype=torch.float64)
    for chunk in torch.split(x, _CHUNK):
        mean += chunk.sum(dim=(0, 2, 3), dtype=torch.float64) / count
    variance = torch.zeros_like(mean)
    for chunk in torch.split(x, _CHUNK):
        variance += (chunk.double() - mean.view(1, -1, 1, 1)).square_().sum(dim=(0, 2, 3)) / count
    deviation = variance.sqrt()
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return mean.float().view(1, -1, 1, 1), deviation.float().view(1, -1, 1, 1)


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.asarray(values)
    if array.dtype.kind not in "buif":
        raise DataError(f"{name}: expected numbers, got dtype {array.dtype}; save it as uint8, int64 or float32.")
    # A copy in native byte order: the array may be read-only, strided backwards or big-endian.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _to_labels(values: Any, name: str) -> Tensor:
    y = _tensor(values, name)
    if y.is_floating_point() or y.ndim != 1:
        raise DataError(f"{name}: expected integer labels of shape [samples], got {y.dtype} of shape {tuple(y.shape)}; save class indices.")
    return y.to(torch.int64)


def _check_split(x: Tensor, y: Tensor, clients: np.ndarray | None, num_classes: int, split: str, source: str) -> None:
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"{source}: expected x_{split} and y_{split} of one length above 0, got {len(x)} and {len(y)}.")
    outside = (y < 0) | (y >= num_classes)
    if bool(outside.any()):
        value = int(y[outside][0])
        raise DataError(
            f"{source}: labels out of range: expected y_{split} in 0..{num_classes - 1}, got {value} "
            f"({int(outside.sum())} such labels); correct the labels or num_classes."
        )
    if clients is not None and (clients.ndim != 1 or len(clients) != len(y) or clients.dtype.kind not in "iuU"):
        raise DataError(
            f"{source}: expected client_{split} to hold one integer or string id for each of {len(y)} samples, "
            f"got {clients.dtype} of shape {clients.shape}; these ids may belong to another data set."
        )
