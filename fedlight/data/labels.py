"""Labels of a data set, for partitions by label: read from wherever people keep them, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fedlight.core.errors import ConfigurationError
from fedlight.core.random import untouched_generators

KEYS = ("labels", "label", "targets", "target", "y")
"""Names that labels go by, as attributes of a data set and as keys of its items."""

_LOOKED_AT = 16  # items whose own label is compared with the shown one


def shown_labels(dataset: Dataset[Any]) -> Tensor | None:
    """Return the integer labels ``[items]`` that a dataset shows as `targets` or `labels`, or as the last of its tensors, else None."""
    if isinstance(dataset, Subset):
        whole = shown_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices))]
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if found is None and isinstance(dataset, TensorDataset):
        found = dataset.tensors[-1]
    if not isinstance(found, (Tensor, np.ndarray, list)):
        return None
    try:
        labels = torch.as_tensor(np.asarray(found))
    except (TypeError, ValueError):  # a ragged list, or strings
        return None
    whole_numbers = not labels.is_floating_point() and not labels.is_complex() and labels.ndim == 1 and bool((labels >= 0).all())
    return labels.to(torch.int64) if whole_numbers and len(labels) == len(dataset) else None  # type: ignore[arg-type]


def read_labels(dataset: Dataset[Any], rows: np.ndarray, given: Callable[[Any], Any] | None, owner: str) -> Tensor:
    """Return the class ``[samples]`` of every item in ``rows``, numbered from 0 where they are no whole numbers from 0.

    What `given` makes of an item; else what the dataset shows, if that is what its items hold; else what the items hold: the second of a
    pair, or a mapping's entry `labels`, `label`, `targets`, `target` or `y`.

    Raises:
        ConfigurationError: if items hold no label that can be told, several at once, or all different ones.
    """
    with untouched_generators():  # items may be augmented
        if given is not None:
            return as_classes([given(dataset[int(row)]) for row in rows], owner)
        shown = _all_shown(dataset)
        if shown is not None:
            kept = [shown[int(row)] for row in rows]
            several = isinstance(dataset, TensorDataset) and len(dataset.tensors) > 2
            held = None if several else _own_labels(dataset, rows[:_LOOKED_AT])
            if not several and (held is None or _agree(kept[:_LOOKED_AT], held)):
                return as_classes(kept, owner)
        found = _own_labels(dataset, rows)
    if found is None:
        raise ConfigurationError(
            f"Expected labels to split {owner} by but its items are no pairs (input, label) and no mappings with one of {', '.join(KEYS)}: "
            "give `labels`, a function of an item, to LightningData or `federate`, or a `partitioner` that needs none, such as IID"
        )
    return as_classes(found, owner)


def as_classes(found: list[Any], owner: str) -> Tensor:
    """Return labels of any form as int64 ``[samples]``: numbers, strings, ``[1]`` each, or one-hot rows.

    >>> as_classes(["dog", "cat", "dog"], "them").tolist()
    [1, 0, 1]
    >>> as_classes([torch.tensor([0, 1]), torch.tensor([1, 0])], "them").tolist()
    [1, 0]

    Raises:
        ConfigurationError: if there are several labels an item, or as many classes as items.
    """
    try:
        labels = np.asarray([np.asarray(label) for label in found])
    except ValueError:  # of different lengths
        labels = np.empty((len(found), 2), dtype=object)
    labels = labels.reshape(len(found), -1) if labels.ndim > 1 else labels[:, None]
    if labels.shape[1] > 1:
        one_hot = labels.dtype.kind in "biuf" and set(np.unique(labels)) <= {0, 1} and bool((labels.sum(1) == 1).all())
        if not one_hot:
            raise ConfigurationError(
                f"Expected one label an item to split {owner} by but items have {labels.shape[1]} or several: give `labels`, a function "
                "that chooses one of them, or a `partitioner` that needs none, such as IID"
            )
        return torch.from_numpy(labels.argmax(1))
    labels = labels[:, 0]
    numbered = labels.dtype.kind in "biu" and labels.min(initial=0) >= 0
    classes = labels.astype(np.int64) if numbered else np.unique(labels, return_inverse=True)[1].astype(np.int64)
    if len(found) > 2 and len(np.unique(classes)) == len(found):
        raise ConfigurationError(
            f"Expected labels to split {owner} by that items share but all {len(found)} are different: give `labels`, a function of one "
            "that returns its class, or a `partitioner` that needs none, such as IID"
        )
    return torch.from_numpy(classes)


def _all_shown(dataset: Dataset[Any]) -> list[Any] | None:
    """Return what a dataset shows as one label an item, in whatever form, or None."""
    if isinstance(dataset, Subset):
        whole = _all_shown(dataset.dataset)
        return None if whole is None else [whole[int(index)] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_all_shown(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts if part is not None for label in part]
    for found in (getattr(dataset, name, None) for name in ("targets", "labels")):
        if isinstance(found, (list, tuple, np.ndarray, Tensor)) and len(found) == len(dataset):  # type: ignore[arg-type]
            return list(found)
    return list(dataset.tensors[1]) if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2 else None


def _own_labels(dataset: Dataset[Any], rows: np.ndarray) -> list[Any] | None:
    """Return the labels that items themselves hold, None if they show none."""
    found = []
    for row in rows:
        item = dataset[int(row)]
        if isinstance(item, Mapping):
            key = next((key for key in KEYS if key in item), None)
            if key is None:
                return None
            found.append(item[key])
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            found.append(item[1])
        else:
            return None
    return found


def _agree(shown: list[Any], held: list[Any]) -> bool:
    """Whether items hold the labels that their dataset shows; by the classes that they make, since a form may differ."""
    pairs = {(str(np.asarray(a).tolist()), str(np.asarray(b).tolist())) for a, b in zip(shown, held, strict=True)}
    return len({a for a, _ in pairs}) == len(pairs) == len({b for _, b in pairs})
