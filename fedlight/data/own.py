"""Data that a user's own LightningDataModule (or LightningModule) loads, as a source of federated data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fedlight.core.errors import ConfigurationError, DataError
from fedlight.data.arrays import Arrays
from fedlight.data.samples import Samples
from fedlight.data.sources import DataSource


class LightningData(DataSource):
    """Splits the training set of a LightningDataModule over clients, and uses its validation and test loaders unchanged.

    It uses dataset and collate function of the training loader; local batches have the algorithm's size. The main process reads items
    when a client trains. Labels, for partitions by label, are the dataset's `targets` or `labels`, or the last tensor of a
    TensorDataset if it holds integers.

    Args:
        datamodule: A LightningDataModule, or a LightningModule with its own loaders.

    Raises:
        DataError: if the training set cannot be split over clients: several loaders, or a dataset without random access.
        ConfigurationError: if the data module changes batches in hooks that clients would not call.
    """

    def __init__(self, datamodule: LightningDataModule | LightningModule) -> None:
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device"):
            if isinstance(datamodule, LightningDataModule) and is_overridden(hook, datamodule, LightningDataModule):
                raise ConfigurationError(
                    f"Expected a data module that does not change batches but {type(datamodule).__name__} overrides `{hook}`: "
                    "move it to the LightningModule, or into the dataset"
                )
        self.datamodule = datamodule
        self._stages: set[str] = set()

    @property
    def name(self) -> str:
        """The class of the data module."""
        return type(self.datamodule).__name__

    def prepare(self, root: Path) -> None:
        """Let the data module download its files."""
        self.datamodule.prepare_data()

    def load(self, root: Path) -> Arrays:
        """Return the training set as samples; there is no test set in memory."""
        self._setup("fit")
        loader = self.datamodule.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise DataError(f"{self.name}: expected train_dataloader() to return one DataLoader, got {type(loader).__name__}; return one.")
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
            raise DataError(
                f"{self.name}: expected a training set with random access and at least one item, to split over clients, got "
                f"{type(dataset).__name__}; give it `__getitem__` and `__len__`."
            )
        samples = cast("Tensor", Samples(dataset, loader.collate_fn))  # instead of a tensor
        labels = labels_of(dataset)
        y = torch.zeros(len(dataset), dtype=torch.int64) if labels is None else labels
        return Arrays(samples, y, samples[:0], y[:0], int(y.max()) + 1)

    def loaders(self, stage: str) -> Any:
        """Return the data module's own loaders of a stage (`val`, `test` or `predict`), an empty list if it has none."""
        self._setup({"val": "validate"}.get(stage, stage))
        method = f"{stage}_dataloader"
        base = LightningDataModule if isinstance(self.datamodule, LightningDataModule) else LightningModule
        return getattr(self.datamodule, method)() if is_overridden(method, self.datamodule, base) else []

    def _setup(self, stage: str) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self.datamodule.setup(stage)


def labels_of(dataset: Dataset[Any]) -> Tensor | None:
    """Return the integer labels ``[items]`` of a dataset that has them as an attribute, else None."""
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
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
