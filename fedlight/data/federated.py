"""The federated data of a run: clients, cohorts, proxy data and evaluation sets. No Lightning."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedlight.core.errors import ConfigurationError, DataError, require
from fedlight.core.random import numpy_generator
from fedlight.data.arrays import Arrays, standardize
from fedlight.data.augment import Augmentation
from fedlight.data.partition import Dirichlet, Partitioner
from fedlight.data.sampling import ClientSampler, Uniform
from fedlight.data.sources import DataSource, Digits
from fedlight.data.splits import HoldOut, Partition, client_by_client, split_holdout, stratified_choice

ROOT_VARIABLE = "FEDLIGHT_DATA"

Pair = tuple[Tensor, Tensor]


def data_root(named: str | None) -> Path:
    """Return the folder of data files: the one named, else that of the environment variable FEDLIGHT_DATA (absolute), else ./data."""
    variable = os.environ.get(ROOT_VARIABLE)
    return Path(variable).expanduser().absolute() if variable and not named else Path(named or "data").expanduser()


class FederatedData:
    """A data set split over clients, in memory, with everything that a federated run needs from data.

    After `setup`: ``x`` ``[samples, *input_shape]`` float32 and ``y`` ``[samples]`` int64 hold the samples of all clients;
    ``partition`` (all of a client's samples) is the disjoint union of ``train_partition`` and ``holdout``; ``proxy``,
    ``val`` (each None if there is none) and ``test`` are pairs (x, y). ``seed`` determines every split.

    Args:
        source: Where the data comes from (Digits if not given).
        partitioner: How to split the training set over clients (Dirichlet(0.5) if not given).
        num_clients: Number of clients in total; null if the partitioner defines them (Natural, Explicit).
        sampler: Which clients take part in a round (Uniform(10) if not given).
        root: Folder of data files; else the environment variable FEDLIGHT_DATA, else ./data.
        proxy_fraction: Share of the training set held out as public proxy data (at least 200 samples; 0 for none).
        proxy_samples: Exact number of proxy samples, instead of proxy_fraction.
        proxy_source: Another data set of the same input shape whose training set is the proxy data (all of it, or
            proxy_samples of it, normalized by its own statistics); it needs val_fraction, because no training data is held out as proxy.
        val_fraction: Share of the training set held out for validation; 0 validates on the held-out proxy data.
        client_holdout: Share of every client's samples held out to evaluate clients one by one; each keeps at least one.
        augmentation: Random change of training images (none if not given).
        proxy_augmentation: Random change of proxy images in recorded rounds (that of training images if not given).
        normalize: Whether images are standardized per channel by statistics of the whole training set.
        eval_batch_size: Samples in a batch of validation, test and prediction.
        seed: Seed of all splits and cohorts.

    Raises:
        ConfigurationError: arguments that contradict each other or the data (in the constructor or in `setup`).
        DataError: data that cannot be read (in `prepare_data` or `setup`).
    """

    x: Tensor
    y: Tensor
    test: Pair
    val: Pair | None
    proxy: Pair | None
    num_classes: int
    input_shape: tuple[int, ...]
    partition: Partition
    train_partition: Partition
    holdout: Partition

    def __init__(
        self,
        source: DataSource | None = None,
        partitioner: Partitioner | None = None,
        num_clients: int | None = 20,
        sampler: ClientSampler | None = None,
        root: str | None = None,
        proxy_fraction: float = 0.05,
        proxy_samples: int | None = None,
        proxy_source: DataSource | None = None,
        val_fraction: float = 0.0,
        client_holdout: float = 0.0,
        augmentation: Augmentation | None = None,
        proxy_augmentation: Augmentation | None = None,
        normalize: bool = True,
        eval_batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source = source if source is not None else Digits()
        self.partitioner = partitioner if partitioner is not None else Dirichlet(0.5)
        self.num_clients = num_clients
        self.sampler = sampler if sampler is not None else Uniform(10)
        self.root = data_root(root)
        self.hold_out = HoldOut(proxy_fraction, proxy_samples, val_fraction)
        self.proxy_source = proxy_source
        self.client_holdout = client_holdout
        self.augmentation = augmentation
        self.proxy_augmentation = proxy_augmentation or augmentation
        self.normalize = normalize
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self._ready = False
        _check_arguments(self)

    def prepare_data(self) -> None:
        """Download missing files, in one process per machine."""
        if not self._ready:
            for source in (self.source, self.proxy_source):
                if source is not None:
                    source.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Load, split and partition the data, once; the stage does not matter."""
        if self._ready:
            return
        data = self._load(self.source)
        data = self.source.with_labels(data) if self.partitioner.by_label else data
        labels = data.y_train.numpy()
        kept, proxy, val = self.hold_out.split(labels, self.proxy_source is None, self.seed)
        self.num_classes, self.input_shape = data.num_classes, tuple(data.x_train.shape[1:])
        self._partition(labels, kept, data.client_train)
        # Training samples are in the order of clients, so that a client's data is a slice, not a copy.
        order = client_by_client(self.train_partition, self.holdout)
        parts = (self.partition, self.train_partition, self.holdout)
        self.partition, self.train_partition, self.holdout = (part.renumbered(order) for part in parts)
        self.x, self.y = data.x_train[kept[order]], data.y_train[kept[order]]
        self.test = (data.x_test, data.y_test)
        self.proxy = _take(data, proxy) if self.proxy_source is None else self._foreign_proxy(self.proxy_source)
        self.val = _take(data, val) if self.hold_out.val_fraction > 0 else self.proxy
        self.sampler.validate(self.num_population)
        for augmentation in (self.augmentation, self.proxy_augmentation):
            if augmentation is not None:
                augmentation.validate(self.input_shape)
        self._ready = True

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors in memory to ``device`` and return the module itself."""
        self.x, self.y = self.x.to(device), self.y.to(device)
        validates_on_proxy = self.val is self.proxy
        self.proxy = _move(self.proxy, device)
        self.val = self.proxy if validates_on_proxy else _move(self.val, device)
        self.test = (self.test[0].to(device), self.test[1].to(device))
        return self

    @property
    def num_population(self) -> int:
        """Total number of clients."""
        return len(self.partition)

    @property
    def client_sizes(self) -> np.ndarray:
        """Number of every client's training samples, int64 ``[clients]``."""
        return self.train_partition.sizes

    def cohort(self, round: int, attempt: int = 0) -> np.ndarray:
        """Return the sorted client ids of a round's attempt, int64 ``[cohort]``: the same on every process."""
        return self.sampler.sample(self.num_population, self.seed, round, attempt)

    def client_size(self, client: int) -> int:
        """Return the number of a client's training samples."""
        return len(self.train_partition[client])

    def client_data(self, client: int, device: torch.device | str | None = None) -> Pair:
        """Return a client's training samples, x ``[samples, ...]`` and y ``[samples]``, on ``device`` (None: where they are)."""
        rows = self.train_partition.rows(client)  # of `x` and `y` too: see `setup`
        pair = (self.x[rows], self.y[rows])
        return pair if device is None else (pair[0].to(device), pair[1].to(device))

    def fingerprint(self) -> str:
        """Return a digest (16 hex digits) of data and splits: it differs if clients, proxy or test data would differ."""
        digest = hashlib.blake2b(digest_size=8)
        proxy = self.proxy_source.name if self.proxy_source is not None else ""
        settings = (self.source.name, proxy, self.hold_out, self.client_holdout, self.normalize, self.seed)
        digest.update(repr((*settings, self.num_classes, self.input_shape)).encode())
        for part in (self.partition, self.holdout):
            digest.update(part.order.tobytes())
            digest.update(part.offsets.tobytes())
        for pair in (self.test, self.proxy or self.test):
            digest.update(pair[1].cpu().numpy().tobytes())
        digest.update(self.y.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _load(self, source: DataSource) -> Arrays:
        data = source.load(self.root)
        return standardize(data) if self.normalize else data

    def _partition(self, labels: np.ndarray, kept: np.ndarray, natural: np.ndarray | None) -> None:
        ids = self.partitioner.client_ids(len(labels), natural)
        rng = numpy_generator(self.seed, "data", "partition")
        self.partition = self.partitioner.partition(labels[kept], self.num_clients, rng, None if ids is None else ids[kept])
        rng = numpy_generator(self.seed, "data", "client_holdout")
        self.train_partition, self.holdout = split_holdout(self.partition, self.client_holdout, rng)

    def _foreign_proxy(self, source: DataSource) -> Pair:
        data = self._load(source)
        shape, samples = tuple(data.x_train.shape[1:]), len(data.y_train)
        if shape != self.input_shape:
            raise DataError(
                f"proxy_source: expected inputs of shape {self.input_shape} as in {self.source.name}, got {shape} in {source.name}."
            )
        count = samples if self.hold_out.proxy_samples is None else self.hold_out.proxy_samples
        require(count <= samples, f"proxy_samples: expected at most the {samples} samples of {source.name}, got {count}.")
        chosen = stratified_choice(data.y_train.numpy(), count, numpy_generator(self.seed, "data", "proxy"))
        return data.x_train[chosen], data.y_train[chosen]


def _take(data: Arrays, indices: np.ndarray) -> Pair | None:
    """Return the training samples at ``indices``, or None if there are none."""
    index = torch.from_numpy(indices)
    return (data.x_train[index], data.y_train[index]) if len(indices) else None


def _move(pair: Pair | None, device: torch.device | str) -> Pair | None:
    return None if pair is None else (pair[0].to(device), pair[1].to(device))


def _check_arguments(data: FederatedData) -> None:
    """Raise ConfigurationError for arguments that are wrong whatever the data set is."""
    require(data.eval_batch_size >= 1, f"eval_batch_size: expected at least 1, got {data.eval_batch_size}.")
    require(0 <= data.client_holdout < 1, f"client_holdout: expected a share of at least 0 and below 1, got {data.client_holdout}.")
    if data.proxy_source is not None and data.hold_out.proxy_samples == 0:
        raise ConfigurationError("proxy_samples: expected more than 0 with a proxy_source, got 0; remove one of them.")
    if data.proxy_source is not None and data.hold_out.val_fraction == 0:
        raise ConfigurationError("val_fraction: expected above 0 with a proxy_source, which cannot validate on this data; set e.g. 0.05.")
    held = data.hold_out.proxy_samples if data.hold_out.proxy_samples is not None else data.hold_out.proxy_fraction
    if data.client_holdout > 0 and held == 0 and data.hold_out.val_fraction == 0:
        raise ConfigurationError(
            "val_fraction: client_holdout needs a global validation set as well; set val_fraction or proxy_samples above 0."
        )
