"""Partitions by label read labels as people have them, or are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset, random_split

from fedlight.core.errors import ConfigurationError
from fedlight.data import IID, Everyone, FederatedDataModule, LightningData, Partitioner, Shards

Y = torch.arange(120) % 6
X = torch.stack([Y.float(), torch.arange(120.0)], 1)  # the first feature tells the class


class Pairs(Dataset):
    def __len__(self):
        return 120

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Keyed(Pairs):
    def __init__(self, key: str) -> None:
        self.key = key

    def __getitem__(self, i):
        return {"x": X[i], self.key: torch.tensor(int(Y[i]))}


class Showing(Pairs):
    def __init__(self, **shown) -> None:
        self.__dict__.update(shown)


class Named(Pairs):
    def __getitem__(self, i):
        return X[i], f"class {int(Y[i])}"


class Bare(Pairs):
    def __getitem__(self, i):
        return X[i]


class Triples(Pairs):
    def __getitem__(self, i):
        return X[i], i, int(Y[i])


HALVES = [Subset(Showing(targets=Y.tolist()), range(60)), Subset(Showing(targets=Y.tolist()), range(60, 120))]
FORMS = {
    "tensors": TensorDataset(X, Y),
    "[n, 1]": TensorDataset(X, Y[:, None]),
    "one-hot": TensorDataset(X, nn.functional.one_hot(Y, 6)),
    "whole floats": TensorDataset(X, Y.float()),
    "pairs": Pairs(),
    "label": Keyed("label"),
    "labels": Keyed("labels"),
    "target": Keyed("target"),
    "targets shown": Showing(targets=Y.tolist()),
    "floats shown": Showing(targets=Y.float()),
    "strings shown": Showing(targets=[f"class {int(y)}" for y in Y]),
    "NumPy shown": Showing(labels=Y.numpy()),
    "names of classes shown": Showing(labels=["cat", "dog", "cow", "owl", "fox", "bee"]),
    "strings in items": Named(),
    "a random split": random_split(Showing(targets=Y.tolist()), [100, 20], torch.Generator().manual_seed(0))[0],
    "a part of pairs": Subset(Pairs(), range(0, 120, 2)),
    "joined": ConcatDataset(HALVES),
    "joined, one shows none": ConcatDataset([HALVES[0], Subset(Pairs(), range(60, 120))]),
    "shown, but not what is trained on": Showing(targets=[0] * 120),
}


class Loads(LightningDataModule):
    def __init__(self, dataset, **loader) -> None:
        super().__init__()
        self.dataset = dataset
        self.loader = loader

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=8, **self.loader)


def split(dataset, partitioner=None, labels=None, **loader) -> FederatedDataModule:
    source = LightningData(Loads(dataset, **loader), labels)
    data = FederatedDataModule(source, partitioner or Shards(1), num_clients=6, sampler=Everyone(), proxy_samples=0)
    data.setup("fit")
    return data


def purity(data: FederatedDataModule) -> float:
    """Return the largest share of one class in a client, averaged over clients."""
    shares = []
    for client in range(6):
        x = data.client_data(client)[0]
        items = [x.dataset[int(row)] for row in x.rows]
        classes = [int((item["x"] if isinstance(item, dict) else item if isinstance(item, torch.Tensor) else item[0])[0]) for item in items]
        shares.append(np.bincount(classes).max() / len(classes))
    return float(np.mean(shares))


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_of_one_class_whatever_the_labels_look_like(form):
    assert purity(split(FORMS[form])) > 0.8


def test_a_function_says_what_no_item_shows():
    for dataset, label in (
        (Bare(), lambda x: int(x[0])),
        (Triples(), lambda item: item[2]),
        (TensorDataset(X, Y, Y), lambda item: item[1]),
    ):
        assert purity(split(dataset, labels=label)) > 0.9


def test_labels_of_the_samples_that_a_sampler_gives():
    data = split(Pairs(), sampler=SubsetRandomSampler(range(30, 90)))
    assert len(data.y) == 60 and purity(data) > 0.9


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Bare(), "no pairs.*give `labels`, a function of an item"),
        (Triples(), "no pairs.*give `labels`"),
        (TensorDataset(X, Y, torch.arange(120)), "no pairs"),
        (TensorDataset(X, torch.ones(120, 3)), "one label an item.*have 3"),
        (TensorDataset(X, torch.arange(120)), "all 120 are different"),
    ],
)
def test_a_split_by_labels_that_are_not_there_is_refused(dataset, message):
    with pytest.raises(ConfigurationError, match=message):
        split(dataset)


def test_a_split_that_needs_no_labels_reads_no_item():
    class Unread(Pairs):
        def __getitem__(self, i):
            raise AssertionError

    assert split(Unread(), IID()).client_size(0) == 20


def test_a_partitioner_of_ones_own_is_given_labels_or_refused():
    class Sorted(Partitioner):
        def assign(self, labels, num_clients, rng, client_ids):
            return labels % num_clients

    assert purity(split(Pairs(), Sorted())) == 1
    with pytest.raises(ConfigurationError, match="Expected labels"):
        split(Bare(), Sorted())
