"""A user's LightningModule on a node of a deployed run: set up as a fit sets it up, and trained by its own `training_step`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from fedlight.clients.algorithms import Algorithm
from fedlight.clients.local_model import Augment, LocalModel
from fedlight.core.process import quiet
from fedlight.data.sources import DataSource
from fedlight.modules.contract import check_contract
from fedlight.modules.own_steps import LocalSteps, speaking
from fedlight.modules.views import OwnTrainer, attach


class NodeRun:
    """What a LightningModule may ask of its run on a node: a Trainer that never fits, the node's data module, the number of rounds.

    Args:
        network: the user's module, which is set up here: `prepare_data`, `setup`, `configure_model`, `on_fit_start`, `on_train_start`.
        source: the node's data source, if it has one; `self.trainer.datamodule` is the LightningDataModule of a ``LightningData``.
        algorithm: local training.
        rounds: rounds of the run, -1 if they are not limited.
        device: where the client trains.

    Raises:
        ConfigurationError: for what clients would not honour.
    """

    def __init__(
        self, network: LightningModule, source: DataSource | None, algorithm: Algorithm, rounds: int, device: torch.device
    ) -> None:
        self.network = network
        self.source = source
        self.device = device
        accelerator = "cpu" if device.type == "cpu" else "auto"
        shows: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        with quiet("lightning.pytorch.utilities.rank_zero"):  # which devices there are is not the question
            self._trainer = Trainer(accelerator=accelerator, devices=1, max_steps=rounds, **shows)
        attach(network, OwnTrainer(self))
        if self.own_datamodule is not None:
            self.own_datamodule.trainer = OwnTrainer(self)
        network.prepare_data()
        network.setup("fit")
        network.configure_model()
        check_contract(network, algorithm)
        network.to(device)
        for hook in ("on_fit_start", "on_train_start"):
            with speaking(network, hook):
                getattr(network, hook)()

    @property
    def own_datamodule(self) -> LightningDataModule | None:
        """The node's own data module, if its data come from one."""
        found: Any = getattr(self.source, "datamodule", None)
        return found if isinstance(found, LightningDataModule) else None

    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what the client trains."""
        return LocalSteps(self, augment)
