"""Modules that everybody knows, small, each with its own loader that does not shuffle: Lightning's own, torchvision's, and usual kinds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer, resnet18

BATCH = 4
"""Samples in a batch of every module."""

SAMPLES = 14
"""Samples of every module, the last batch smaller for one process and for each of two."""


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Known(LightningModule):
    """A module whose draws (dropout, noise, views) depend on epoch and batch alone, so that two ways of training can be compared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Boring(BoringModel):
    """Lightning's BoringModel, with data that are the same for everybody who asks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def train_dataloader(self):
        return DataLoader(torch.randn(SAMPLES, 32, generator=fixed()), batch_size=BATCH)


class Tokens(LightningTransformer):
    """Lightning's LightningTransformer, with dropout, on random tokens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(vocab_size=32)

    on_train_batch_start = Known.on_train_batch_start

    def prepare_data(self) -> None:
        """Fetch nothing."""

    def train_dataloader(self):
        tokens = torch.randint(32, (SAMPLES, 13), generator=fixed())
        return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:].contiguous()), batch_size=BATCH)


def images(size: int) -> DataLoader:
    x = torch.randn(SAMPLES, 3, size, size, generator=fixed())
    return DataLoader(TensorDataset(x, torch.arange(SAMPLES) % 3), batch_size=BATCH)


class ResNet(Known):
    """torchvision's ResNet-18: BatchNorm, momentum, weight decay and a schedule of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=3)

    def train_dataloader(self):
        return images(32)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=30, cycle_momentum=False)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Vision(Known):
    """torchvision's VisionTransformer with dropout and label smoothing; Adam with two groups, and a schedule of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3, dropout=0.1)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5]))

    def loss(self, batch):
        return self.criterion(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return images(16)

    def configure_optimizers(self):
        heads = [*self.net.heads.parameters()]
        others = [p for p in self.net.parameters() if not any(p is head for head in heads)]
        optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.1}, {"params": heads, "lr": 1e-2, "weight_decay": 0.0}], lr=1e-3
        )
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)}


def by_length(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Collate sentences of any length as dicts of padded tensors."""
    words, tags = zip(*items, strict=True)
    lengths = torch.tensor([len(sentence) for sentence in words])
    return {"words": pad_sequence(words, True), "tags": pad_sequence(tags, True, -100), "lengths": lengths}


class Tagger(Known):
    """A two-way LSTM that tags packed sentences, with a padding index."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 6, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 4)

    def loss(self, batch):
        packed = pack_padded_sequence(self.embedding(batch["words"]), batch["lengths"].cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return nn.functional.cross_entropy(self.head(hidden).transpose(1, 2), batch["tags"], ignore_index=-100)

    def train_dataloader(self):
        lengths = [3, 7, 1, 5, 4, 9, 2, 6, 8, 3, 2, 5, 7, 1]
        words = [torch.randint(1, 20, (length,), generator=fixed()) for length in lengths]
        return DataLoader([(sentence, sentence % 4) for sentence in words], batch_size=BATCH, collate_fn=by_length)


class Autoencoder(Known):
    """A variational autoencoder: noise in the step, and a weight of its second term that grows from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 12))

    def loss(self, batch):
        (x,) = batch
        mean, spread = self.encoder(x).chunk(2, dim=-1)
        normal = torch.distributions.Normal(mean, spread.exp())
        distance = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(spread)))
        weight = min(1.0, (1 + self.current_epoch) / 3)
        return nn.functional.mse_loss(self.decoder(normal.rsample()), x) + weight * distance.sum(-1).mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(SAMPLES, 12, generator=fixed())), batch_size=BATCH)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Contrastive(Known):
    """Two noisy views, a teacher that follows the student by steps, and a queue of keys of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(12, 8), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def loss(self, batch):
        (x,) = batch
        query = nn.functional.normalize(self.student(x + 0.1 * torch.randn_like(x)), dim=1)
        with torch.no_grad():
            key = nn.functional.normalize(self.teacher(x + 0.1 * torch.randn_like(x)), dim=1)
        others = query @ self.queue.clone().T
        loss = nn.functional.cross_entropy(torch.cat([(query * key).sum(1, keepdim=True), others], 1) / 0.2, torch.zeros(len(x)).long())
        rows = (int(self.place) + torch.arange(len(x))) % 12
        self.queue[rows] = key
        self.place.copy_((self.place + len(x)) % 12)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(SAMPLES, 12, generator=fixed())), batch_size=BATCH)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)


class Heads(Known):
    """Several heads on a body: one for every other batch, one on the first process alone, one that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.often = nn.Linear(12, 8), nn.Linear(8, 3)
        self.alternate, self.first, self.never = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        hidden = self.body(batch[0])
        logits = self.often(hidden)
        if batch_idx % 2:
            logits = logits + self.alternate(hidden)
        if self.global_rank == 0:
            logits = logits + self.first(hidden)
        return nn.functional.cross_entropy(logits, batch[1])

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(SAMPLES, 12, generator=fixed()), torch.arange(SAMPLES) % 3), batch_size=BATCH)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Gan(Known):
    """Two networks against each other, each with its optimizer, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, 12), nn.Linear(12, 1)

    def training_step(self, batch, batch_idx):
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            optimizer.zero_grad()
            made = self.generator(torch.randn(len(batch[0]), 2))
            self.manual_backward(sign * (self.critic(batch[0]).mean() - self.critic(made).mean()))
            optimizer.step()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(SAMPLES, 12, generator=fixed())), batch_size=BATCH)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.critic, self.generator)]


KNOWN = (Boring, Tokens, ResNet, Vision, Tagger, Autoencoder, Contrastive, Heads)
"""All that are trained by their loss."""
