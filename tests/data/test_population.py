"""What a population costs: clients are ranges of one index array, not Python objects, so that 100,000 of them start at once."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
import torch

from fedlight.data import IID, DataSource, Dirichlet, Explicit, FederatedDataModule, Natural, QuantitySkew, Shards, Uniform
from fedlight.data.arrays import Arrays, build_arrays
from tests.federation import FEATURES, federated, trainer

CLIENTS = 100_000
SAMPLES = 2 * CLIENTS


class Many(DataSource):
    """A few features and a label a sample, and clients of two samples each."""

    def load(self, root) -> Arrays:
        x = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
        y = torch.arange(SAMPLES) % 3
        return build_arrays(x, y, x[:100], y[:100], source=self.name, client_train=np.arange(SAMPLES) // 2)


def population(partitioner, clients: int | None = CLIENTS) -> FederatedDataModule:
    holds = {"proxy_fraction": 0.0, "val_fraction": 1e-5, "client_holdout": 0.5}  # Natural clients keep a sample at least
    return FederatedDataModule(Many(), partitioner, num_clients=clients, sampler=Uniform(4), **holds)


def objects_made(work) -> int:
    gc.collect()
    before = sys.getallocatedblocks()
    work()
    gc.collect()
    return sys.getallocatedblocks() - before


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("partitioner", "clients"),
    [(IID(), CLIENTS), (Dirichlet(0.5), CLIENTS), (Shards(1), CLIENTS), (QuantitySkew(1.0), CLIENTS), (Natural(), None)],
    ids=["IID", "Dirichlet", "Shards", "QuantitySkew", "Natural"],
)
def test_a_population_makes_no_object_for_a_client_or_a_sample(partitioner, clients):
    data = population(partitioner, clients)
    assert objects_made(data.setup) < 5_000
    assert data.num_population >= CLIENTS - 2  # validation samples may have been all of a natural client's
    assert objects_made(lambda: [data.cohort(round) for round in range(20)]) < 500


def test_clients_are_views_on_one_array():
    data = population(Dirichlet(0.5))
    data.setup()
    for client in data.cohort(0).tolist():
        rows = data.train_partition[client]
        assert rows.base is data.train_partition.order
        x, y = data.client_data(client)
        assert x.untyped_storage().data_ptr() == data.x.untyped_storage().data_ptr()
        assert y.untyped_storage().data_ptr() == data.y.untyped_storage().data_ptr()
        assert torch.equal(y, data.y[torch.from_numpy(rows)])
    sizes = data.client_sizes
    assert sizes.shape == (CLIENTS,)
    assert [sizes[client] for client in data.cohort(0)] == [data.client_size(client) for client in data.cohort(0)]


def test_explicit_lists_become_one_array():
    lists = np.arange(SAMPLES).reshape(CLIENTS, 2).tolist()
    data = FederatedDataModule(Many(), Explicit(lists), None, Uniform(4), proxy_fraction=0.0)
    assert objects_made(data.setup) < 5_000
    assert data.train_partition[7].base is data.train_partition.order


def test_a_run_makes_objects_for_its_cohorts_only():
    """With weights by samples, clients' own evaluation and everything else that knows of the population."""
    data = population(IID())
    data.setup()
    module = federated(weighting="samples")
    run = trainer(2, limit_val_batches=1.0, val_check_interval=1)
    run.fit(federated(), datamodule=data)  # what Lightning keeps of a first run
    assert objects_made(lambda: trainer(2, limit_val_batches=1.0, val_check_interval=1).fit(module, datamodule=data)) < CLIENTS // 4
    assert module.server_state.traffic.messages == 8
