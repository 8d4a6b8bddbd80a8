"""Federate a LightningModule and a LightningDataModule as they are: 20 clients, codes 16 times shorter than updates.

python examples/own_module.py
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fedlight


class Digits(LightningDataModule):
    """Scikit-learn's digits; nothing in it knows of clients."""

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        self.parts = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[0], batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[1], batch_size=256)


class Classifier(LightningModule):
    """An ordinary module: clients run its training step and its optimizer, the server its validation step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        correct = self.network(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(rounds: int = 60) -> float:
    """Train and return the validation accuracy."""
    seed_everything(0)
    model = fedlight.federate(
        Classifier(), Digits(), num_clients=20, partitioner=fedlight.Dirichlet(alpha=0.5), codec=fedlight.TransformCodec(ratio=16)
    )
    trainer = Trainer(max_steps=rounds, accelerator="cpu")  # a step is a round
    trainer.fit(model)
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(f"accuracy {accuracy:.1%}, messages {float(trainer.callback_metrics['bytes/ratio']):.1f} times shorter than updates")
    return accuracy


if __name__ == "__main__":
    main()
