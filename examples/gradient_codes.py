"""Plain data-parallel training, no federation: two processes all-reduce short codes of their gradients.

python examples/gradient_codes.py
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fedlight


class Classifier(LightningModule):
    """An ordinary module; the codes are the Trainer's business."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(epochs: int = 10, devices: int = 2) -> float:
    """Train and return how many times fewer bytes were all-reduced than whole gradients have."""
    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    codes = fedlight.GradientCodes(fedlight.PowerSGDCodec(rank=2), warmup_steps=2, min_size=512, int8=True)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=epochs, callbacks=[codes], logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True))
    loss, ratio = (float(trainer.callback_metrics[name]) for name in ("loss", "gradients/ratio"))
    if trainer.is_global_zero:
        print(f"loss {loss:.3f}, {ratio:.1f} times fewer bytes than whole gradients")
    return ratio


if __name__ == "__main__":
    main()
