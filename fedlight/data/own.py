"""Data that a user's own LightningDataModule (or LightningModule) loads, as a source of federated data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fedlight.core.errors import DataError
from fedlight.core.kinds import refuse_other_lightning, require_kinds
from fedlight.data.arrays import Arrays
from fedlight.data.labels import read_labels, shown_labels
from fedlight.data.order import order_of
from fedlight.data.samples import Samples
from fedlight.data.sources import DataSource


class LightningData(DataSource):
    """Splits the training set of a LightningDataModule over clients, and uses its validation and test loaders unchanged.

    It uses dataset, collate function, sampler and `drop_last` of the training loader; local batches have the algorithm's size. The main
    process reads items when a client trains. Partitions by label read labels as the dataset shows them (`targets`, `labels`), else from
    its items (pairs, or mappings with a label).

    Args:
        datamodule: A LightningDataModule, or a LightningModule with its own loaders.
        labels: Returns the label of an item, for partitions by label (found by itself if not given).

    Raises:
        DataError: if the training set cannot be split over clients: several loaders, or a dataset without random access.
        ConfigurationError: for a module of pytorch_lightning; if the loader's sampler cannot be split, or no labels are found for a
            partition by label.
    """

    has_loaders = True

    def __init__(self, datamodule: LightningDataModule | LightningModule, labels: Callable[[Any], Any] | None = None) -> None:
        refuse_other_lightning("datamodule", datamodule)
        require_kinds(locals(), {"datamodule": LightningDataModule | LightningModule, "labels": Callable | None})  # type: ignore[dict-item]
        self.datamodule = datamodule
        self.labels = labels
        self.loader: DataLoader[Any] | None = None  # the training loader, once it is loaded
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
        if not self.offers("train"):
            raise DataError(
                f"{self.name}: expected a train_dataloader(), whose items clients share, got none; write one, or validate, test and "
                "predict with your own module (`FederatedModule.module`) and a plain Trainer."
            )
        self.set_up("fit")
        loader = self.datamodule.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise DataError(f"{self.name}: expected train_dataloader() to return one DataLoader, got {type(loader).__name__}; return one.")
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
            raise DataError(
                f"{self.name}: expected a training set with random access and at least one item, to split over clients, got "
                f"{type(dataset).__name__}; give it `__getitem__` and `__len__`."
            )
        order, rows = order_of(loader, self.name)
        self.loader = loader
        samples = cast("Tensor", Samples(dataset, loader.collate_fn, rows, order))  # instead of a tensor
        labels = shown_labels(dataset)
        y = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels[torch.from_numpy(rows)]
        return Arrays(samples, y, samples[:0], y[:0], int(y.max()) + 1)

    def with_labels(self, data: Arrays) -> Arrays:
        """Return the data with labels that are those of its items; raises ``ConfigurationError`` if there are none."""
        samples = cast("Samples", data.x_train)
        y = read_labels(samples.dataset, samples.rows, self.labels, self.name)
        return replace(data, y_train=y, y_test=y[:0], num_classes=int(y.max()) + 1)

    def loaders(self, stage: str) -> Any:
        """Return the data module's own loaders of a stage (`val`, `test` or `predict`), an empty list if it has none."""
        self.set_up({"val": "validate"}.get(stage, stage))
        return getattr(self.datamodule, f"{stage}_dataloader")() if self.offers(stage) else []

    def offers(self, stage: str) -> bool:
        """Whether the data module has loaders of a stage (`train`, `val`, `test` or `predict`)."""
        base = LightningDataModule if isinstance(self.datamodule, LightningDataModule) else LightningModule
        return bool(is_overridden(f"{stage}_dataloader", self.datamodule, base))

    def set_up(self, stage: str) -> None:
        """Let the data module set itself up for a stage, once; a fit's set-up is that of its validation too, as Lightning has it."""
        if stage not in self._stages and not (stage == "validate" and "fit" in self._stages):
            self._stages.add(stage)
            self.datamodule.setup(stage)
