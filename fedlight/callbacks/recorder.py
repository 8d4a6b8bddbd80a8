"""Recording clients' updates while a federated run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fedlight.callbacks.base import FederatedCallback, FederatedRun
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError, require_counts
from fedlight.core.layout import Layout
from fedlight.rounds.call import Call
from fedlight.rounds.messages import ClientUpdate


class UpdateRecorder(FederatedCallback):
    """Keeps plain updates of a simulated run as an update bank, to study codecs on: a simulation only, no server sees these.

    Args:
        clients: Clients recorded in a round, the first of the cohort; rounds with fewer usable ones are left out.
        every_n_rounds: Rounds between recordings.
        path: File that the bank is written to at the end (`updates.safetensors` in the run's folder if not given).
    """

    def __init__(self, clients: int = 10, every_n_rounds: int = 1, path: str | None = None) -> None:
        require_counts(clients=clients, every_n_rounds=every_n_rounds)
        self.clients = clients
        self.every_n_rounds = every_n_rounds
        self.path = path
        self._rounds: list[Tensor] = []
        self._current: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several processes, which would each see a part of a cohort."""
        if trainer.world_size > 1:
            raise ConfigurationError(f"Expected one process but got {trainer.world_size}: record with `--trainer.devices 1`")

    def on_round_start(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Begin a round anew, also where it is repeated."""
        self._current = []

    def on_client_update(self, trainer: Trainer, pl_module: LightningModule, context: Context, update: ClientUpdate) -> None:
        """Keep a client's update, if its training went well."""
        if update.usable and context.round % self.every_n_rounds == 0 and len(self._current) < self.clients:
            self._current.append(update.update.detach().cpu().clone())

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Keep the round if it is complete."""
        if len(self._current) == self.clients:
            self._rounds.append(torch.stack(self._current))

    def bank(self, layout: Layout) -> UpdateBank:
        """Return what was recorded; raises ``ConfigurationError`` if nothing was."""
        if not self._rounds:
            raise ConfigurationError(f"Expected at least one recorded round but no round had {self.clients} usable clients")
        return UpdateBank(torch.stack(self._rounds), layout)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the bank."""
        if self._rounds:
            path = Path(self.path) if self.path else Path(trainer.log_dir or trainer.default_root_dir) / "updates.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.bank(cast("FederatedRun", pl_module).upload_layout).save(path)
