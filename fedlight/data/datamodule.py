"""Federated data as a LightningDataModule, with the loaders of a run, and other LightningDataModules as their source."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fedlight.core.errors import DataError
from fedlight.core.kinds import refuse_other_lightning, require_kinds
from fedlight.data.arrays import Arrays
from fedlight.data.federated import FederatedData
from fedlight.data.labels import read_labels, shown_labels
from fedlight.data.samples import Samples, order_of
from fedlight.data.sources import DataSource

Batch = TypeVar("Batch")


class Rounds:
    """An endless count of rounds, one int64 scalar a round: items of this loader, a round's number is the Trainer's global step.

    A plain iterable like `Batches`: to a DataLoader Lightning would add a sampler that repeats samples, and recommend workers.
    """

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(number) for number in itertools.count())


class Batches(Generic[Batch]):
    """Batches of an evaluation set, each sample exactly once over all processes.

    Process ``rank`` of ``world`` takes the ``rank``-th contiguous part and cuts it into the same number of batches as every
    other process, so hooks with collectives stay synchronized; a batch is at most one sample larger than ``batch_size``, and
    only where parts differ in size.

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(self, samples: int, fetch: Callable[[slice], Batch], batch_size: int) -> None:
        self.samples = samples
        self.fetch = fetch
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def __iter__(self) -> Iterator[Batch]:
        return (self.fetch(slice(start, stop)) for start, stop in itertools.pairwise(self._bounds()))

    def _bounds(self) -> list[int]:
        return batch_bounds(self.samples, self.batch_size, *rank_and_world())


def batch_bounds(samples: int, batch_size: int, rank: int, world: int) -> list[int]:
    """Return the ``batches + 1`` boundaries of a process's batches; the number of batches is equal on all processes."""
    if samples < world:
        raise DataError(f"evaluation data: expected a sample for each of {world} processes, got {samples}; evaluate on fewer devices.")
    first, last = samples * rank // world, samples * (rank + 1) // world
    batches = -(-(samples // world) // batch_size)
    return [first + (last - first) * batch // batches for batch in range(batches + 1)]


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) without distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class FederatedDataModule(FederatedData, L.LightningDataModule):
    """`FederatedData` for a Trainer: the same arguments, and the loaders of a run."""

    def __str__(self) -> str:
        # Lightning's version needs the dataset of every loader, which these do not have.
        state = f"{len(self.y)} samples of {self.num_population} clients" if self._ready else "not set up"
        return f"{type(self).__name__}({self.source.name}, {type(self.partitioner).__name__}: {state})"

    def train_dataloader(self) -> Rounds:
        """Return an endless loader with one item per round."""
        return Rounds()

    def val_dataloader(self) -> list[Batches[tuple[Tensor, ...]]]:
        """Return [batches (x, y) of the validation set] and, if clients hold out samples, batches (x, y, client) as second item."""
        if (own := self.source.loaders("val")) is not None:
            return own  # type: ignore[no-any-return]
        if self.val is None:
            return []
        loaders = [self._batches("val")]
        if len(self.holdout.order):
            loaders.append(self._holdout_batches())
        return loaders

    def test_dataloader(self) -> Batches[tuple[Tensor, ...]]:
        """Return batches (x, y) of the test set."""
        if (own := self.source.loaders("test")) is not None:
            return own  # type: ignore[no-any-return]
        return self._batches("test")

    def predict_dataloader(self) -> Batches[Tensor]:
        """Return batches x of the test set, in order."""
        if (own := self.source.loaders("predict")) is not None:
            return own  # type: ignore[no-any-return]
        return Batches(len(self.test[1]), lambda rows: self.test[0][rows], self.eval_batch_size)

    def _batches(self, name: str) -> Batches[tuple[Tensor, ...]]:
        # Looks the pair up for each batch, so that a loader from before `to` uses the moved tensors.
        def fetch(rows: slice) -> tuple[Tensor, ...]:
            x, y = getattr(self, name)
            return x[rows], y[rows]

        return Batches(len(getattr(self, name)[1]), fetch, self.eval_batch_size)

    def _holdout_batches(self) -> Batches[tuple[Tensor, ...]]:
        order, clients = torch.from_numpy(self.holdout.order), torch.from_numpy(self.holdout.clients)

        def fetch(rows: slice) -> tuple[Tensor, ...]:
            index = order[rows].to(self.x.device)
            return self.x[index], self.y[index], clients[rows].to(self.x.device)

        return Batches(len(order), fetch, self.eval_batch_size)


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
