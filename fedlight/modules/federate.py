"""Federating a module of one's own in one call."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from fedlight.core.errors import ConfigurationError
from fedlight.data import IID, ClientSampler, FederatedDataModule, LightningData, Partitioner, Uniform
from fedlight.modules.federated import FederatedModule


def federate(
    network: nn.Module,
    data: LightningDataModule | None = None,
    num_clients: int = 20,
    cohort_size: int = 10,
    partitioner: Partitioner | None = None,
    sampler: ClientSampler | None = None,
    proxy_samples: int | None = None,
    **settings: Any,
) -> FederatedModule:
    """Return a module for a Trainer, `Trainer(max_steps=rounds).fit(federate(mine, my_data))`, that trains a user's own by federation.

    Args:
        network: A LightningModule, untouched (its `training_step`, optimizer and evaluation are used), or any network with `loss=`.
        data: A LightningDataModule, untouched; the module's own loaders if not given. A FederatedDataModule is used as it is.
        num_clients: Number of clients that the training set is spread over.
        cohort_size: Clients in a round (all of them, if there are fewer).
        partitioner: How it is spread (evenly at random, IID, if not given).
        sampler: Which clients take part in a round, instead of `cohort_size` random ones.
        proxy_samples: Training samples kept from clients to pretrain the codec on (a twentieth of them if the codec needs any).
        **settings: Other arguments of FederatedModule, such as `codec`, `algorithm`, `loss` and `seed`.

    Raises:
        ConfigurationError: if there is no data, or an argument is out of range, or one that a FederatedDataModule has itself.
    """
    module = FederatedModule(network, **settings)
    if isinstance(data, FederatedDataModule):
        asked = (num_clients, cohort_size) != (20, 10) or any(part is not None for part in (partitioner, sampler, proxy_samples))
        if asked:
            raise ConfigurationError(
                "Expected none of `num_clients`, `cohort_size`, `partitioner`, `sampler` and `proxy_samples` with a FederatedDataModule, "
                "which has its own, but got at least one: set them there"
            )
        module.own_data = data
        return module
    if data is None and not isinstance(network, LightningModule):
        raise ConfigurationError(
            f"Expected `data` for a {type(network).__name__}, which loads none, but got None: give a LightningDataModule"
        )
    module.own_data = FederatedDataModule(
        source=LightningData(network if data is None else data),  # type: ignore[arg-type]
        partitioner=partitioner or IID(),
        num_clients=num_clients,
        sampler=sampler or Uniform(min(cohort_size, num_clients)),
        proxy_fraction=0.05 if module.codec.needs_fit and not module.codec_path else 0.0,
        proxy_samples=proxy_samples,
        normalize=False,
        seed=module.seed,
    )
    return module
