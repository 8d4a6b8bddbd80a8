"""Modules and data as users of Lightning write them, with nothing of fedlight in them (also by class path, in YAML)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

TEXT = "to be or not to be that is the question " * 20


class LitClassifier(LightningModule):
    """Three classes of points; metrics, logging, a schedule, BatchNorm: what an ordinary module has."""

    def __init__(self, lr: float = 0.05, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 3))
        self.train_accuracy = MulticlassAccuracy(3)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.train_accuracy(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy)
        assert self.trainer.max_steps
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_accuracy", self.accuracy)

    def test_step(self, batch, batch_idx):
        self.log("test_accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Points(LightningDataModule):
    """Gaussian clusters."""

    def __init__(self, samples: int = 240) -> None:
        super().__init__()
        self.samples = samples

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(3, (self.samples + 60,), generator=generator)
        x = torch.randn(len(y), 6, generator=generator) + 3 * nn.functional.one_hot(y, 6)
        self.train, self.rest = TensorDataset(x[:-60], y[:-60]), TensorDataset(x[-60:], y[-60:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rest, batch_size=25)

    def test_dataloader(self):
        return DataLoader(self.rest, batch_size=25)


class Line(LightningDataModule):
    """A linear regression with float targets."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(200, 4, generator=generator)
        y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 3
        self.train, self.rest = TensorDataset(x[:160], y[:160]), TensorDataset(x[160:], y[160:])

    def train_dataloader(self):
        return DataLoader(self.train)

    def val_dataloader(self):
        return DataLoader(self.rest, batch_size=16)

    def test_dataloader(self):
        return self.val_dataloader()


class Characters(Dataset):
    """Windows of a text as dicts: no pair, no tensor."""

    def __init__(self, text: str, length: int = 12) -> None:
        letters = sorted(set(TEXT))
        self.codes = torch.tensor([letters.index(letter) for letter in text])
        self.length = length

    def __len__(self) -> int:
        return len(self.codes) - self.length

    def __getitem__(self, index: int):
        return {"tokens": self.codes[index : index + self.length], "next": self.codes[index + 1 : index + self.length + 1]}


class Text(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Characters(TEXT[:-100]), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Characters(TEXT[-100:]), batch_size=8)


class LitLanguageModel(LightningModule):
    """A character model; its step takes no batch index."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(set(TEXT)), 8)
        self.rnn = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, len(set(TEXT)))

    def loss(self, batch) -> Tensor:
        hidden, _ = self.rnn(self.embedding(batch["tokens"]))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), batch["next"].flatten())

    def training_step(self, batch):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_perplexity", self.loss(batch).exp())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)
