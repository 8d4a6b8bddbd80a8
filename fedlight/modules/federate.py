"""Federated training of your own module in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torchmetrics import Metric, MetricCollection

from fedlight.aggregation import Aggregator
from fedlight.clients import Algorithm, Engine
from fedlight.console.names import did_you_mean
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.kinds import kinds_of, refuse_other_lightning, require_kinds
from fedlight.data import IID, ClientSampler, FederatedDataModule, LightningData, Partitioner, Uniform
from fedlight.modules.federated import FederatedModule
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds import Availability, Clients, Downlink


class ModuleSettings(TypedDict, total=False):
    """The optional arguments of `FederatedModule`, which `federate` passes on."""

    codec: Codec | None
    codec_path: str | None
    algorithm: Algorithm | None
    engine: Engine | None
    loss: nn.Module | None
    server_optimizer: OptimizerCallable
    server_scheduler: LRSchedulerCallable | None
    privacy: PrivacyMechanism | None
    downlink: Downlink | None
    aggregator: Aggregator | None
    clients: Clients | None
    weighting: Literal["equal", "samples"]
    availability: Availability | None
    batch_norm: Literal["mean", "local"]
    metrics: dict[str, Metric | MetricCollection] | MetricCollection | None
    min_clients: int
    max_attempts: int
    client_memory_mb: float
    sim_every: int
    seed: int


def federate(
    network: nn.Module,
    data: LightningDataModule | None = None,
    num_clients: int = 20,
    cohort_size: int | None = None,
    partitioner: Partitioner | None = None,
    sampler: ClientSampler | None = None,
    proxy_samples: int | None = None,
    labels: Callable[[Any], Any] | None = None,
    **settings: Unpack[ModuleSettings],
) -> FederatedModule:
    """Return a module that trains your network by federation: `Trainer(max_steps=rounds).fit(federate(mine, my_data))`.

    Args:
        network: A LightningModule, untouched (its `training_step`, optimizer and evaluation are used), or any network with `loss=`.
        data: A LightningDataModule, untouched; the module's own loaders if not given. A FederatedDataModule is used as it is.
        num_clients: Number of clients that share the training set.
        cohort_size: Number of clients in a round (10, or all of fewer, if not given).
        partitioner: How to split the training set over clients (evenly at random, IID, if not given).
        sampler: Which clients take part in a round, instead of `cohort_size` random ones.
        proxy_samples: Number of training samples set aside to pretrain the codec on (a twentieth of them if the codec needs any).
        labels: Returns the label of an item, for partitions by label (found by itself if not given).
        **settings: Other arguments of FederatedModule, such as `codec`, `algorithm`, `loss` and `seed`.

    Raises:
        ConfigurationError: if there is no data, or an argument is of another kind, out of range, or one that a FederatedDataModule has
            itself.
        TypeError: if there is no argument of such a name.
    """
    refuse_other_lightning("data", data)
    kinds = kinds_of(federate) | {"data": LightningDataModule | LightningModule | None}
    require_kinds(locals(), kinds)
    for name in settings.keys() - ModuleSettings.__annotations__.keys():
        raise TypeError(f"There is no argument {name} of federate{did_you_mean(name, (*kinds, *ModuleSettings.__annotations__))}")
    module = FederatedModule(network, **settings)
    if isinstance(data, FederatedDataModule):
        asked = num_clients != 20 or any(part is not None for part in (cohort_size, partitioner, sampler, proxy_samples, labels))
        if asked:
            raise ConfigurationError(
                "Expected none of `num_clients`, `cohort_size`, `partitioner`, `sampler`, `proxy_samples` and `labels` with a "
                "FederatedDataModule, which has its own, but got at least one: set them there"
            )
        module.own_data = data
        return module
    if data is None and not isinstance(network, LightningModule):
        raise ConfigurationError(
            f"Expected `data` for a {type(network).__name__}, which loads none, but got None: give a LightningDataModule"
        )
    module.own_data = FederatedDataModule(
        source=LightningData(network if data is None else data, labels),  # type: ignore[arg-type]
        partitioner=partitioner or IID(),
        num_clients=num_clients,
        sampler=sampler or Uniform(min(10, num_clients) if cohort_size is None else cohort_size),
        proxy_fraction=0.05 if module.codec.needs_fit and not module.codec_path else 0.0,
        proxy_samples=proxy_samples,
        normalize=False,
        seed=module.seed,
    )
    return module
