"""What Lightning asks a module for and a federated one only passes on: data of its own, and evaluation, which its task does."""

from __future__ import annotations

from typing import Any

from fedlight.callbacks.base import FederatedRun, section
from fedlight.core.errors import ConfigurationError
from fedlight.data import FederatedDataModule
from fedlight.modules.task import Task


class Forwarding(FederatedRun):
    """Loaders come from the data, evaluation and prediction from the task."""

    task: Task
    own_data: FederatedDataModule | None
    """Data for a Trainer that is given no data module."""

    # -- data ------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> FederatedDataModule:
        """The Trainer's data module, or what `fedlight.federate` was given."""
        data = getattr(self.trainer, "datamodule", None) or self.own_data
        if not isinstance(data, FederatedDataModule):
            raise ConfigurationError(
                f"Expected a FederatedDataModule but got {type(data).__name__}: pass datamodule=FederatedDataModule(...), for a data "
                "module of your own FederatedDataModule(source=LightningData(yours)), or use `fedlight.federate(module, yours)`"
            )
        return data

    def prepare_data(self) -> None:
        """Fetch the data that no Trainer was given."""
        if self.own_data is not None:
            self.own_data.prepare_data()

    def train_dataloader(self) -> Any:
        """Return the rounds, of a Trainer that was given no data module."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        """Return the validation loaders, of a Trainer that was given no data module."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Return the test loaders, of a Trainer that was given no data module."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the loaders to predict, of a Trainer that was given no data module."""
        return self.data.predict_dataloader()

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate the global model on the server's data, and on what clients hold out."""
        with section(self.trainer, "validation"):
            self.task.evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate the global model on the test set."""
        self.task.evaluate("test", batch, batch_idx, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Begin a validation."""
        self.task.epoch_start("val")

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self.task.epoch_end("val")

    def on_test_epoch_start(self) -> None:
        """Begin a test."""
        self.task.epoch_start("test")

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self.task.epoch_end("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the predicted labels ``[n]``, or what the network makes of the batch where it is no classification."""
        return self.task.predict(batch, batch_idx)
