"""Federated data as a LightningDataModule: the loaders of a run."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from fedlight.data.federated import FederatedData
from fedlight.data.loaders import Batches, Rounds


class FederatedDataModule(FederatedData, L.LightningDataModule):
    """`FederatedData` for a Trainer: the same arguments, and the loaders of a run."""

    def __str__(self) -> str:
        # Lightning's version needs the dataset of every loader, which these do not have.
        state = f"{len(self.y)} samples of {self.num_population} clients" if self._ready else "not set up"
        return f"{type(self).__name__}({self.source.name}, {type(self.partitioner).__name__}: {state})"

    # -- loaders ---------------------------------------------------------------------------------------------------

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
