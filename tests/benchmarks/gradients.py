"""Data-parallel training of a small ResNet in two gloo processes: bytes all-reduced against accuracy, codes beside PowerSGD.

    python tests/benchmarks/gradients.py --dataset mnist

Every row trains from the same weights on the same batches; bytes are those handed to all-reduces and broadcasts by one process,
warm-up steps and refits included.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.utils.data import DataLoader, TensorDataset

from fedlight.callbacks import GradientCodes
from fedlight.codecs import ChainCodec, HalfCodec, PowerSGDCodec, TwoSidedCodec
from fedlight.data import ArrayFile, Torchvision, standardize

WARMUP = 2
BUCKET_MB = 64  # all gradients in one bucket: with more, the collectives of torch's PowerSGD come in another order on each process of gloo
SOURCES = {"mnist": lambda: Torchvision("MNIST"), "cifar10": lambda: ArrayFile("cifar10_20k.npz", more_test=4000)}


def learned(ratio: float) -> GradientCodes:
    """Two-sided projections as float16, fitted anew every 40 steps to rank 0's own gradients."""
    codec = ChainCodec([TwoSidedCodec(ratio=ratio), HalfCodec()])
    return GradientCodes(codec, warmup_steps=1, refit_every=40, window=4)


def power(rank: int, int8: bool = False) -> GradientCodes:
    """PowerSGD of fedlight; the first convolution (864 numbers here) has a code as well."""
    return GradientCodes(PowerSGDCodec(rank), warmup_steps=WARMUP, min_size=512, int8=int8)


class Torch(Callback):
    """Torch's PowerSGD, with its bytes counted at `all_reduce`."""

    def __init__(self, rank: int) -> None:
        self.state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=WARMUP, min_compression_rate=1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(self.state, powerSGD_hook.powerSGD_hook)  # type: ignore[union-attr, operator]


ROWS: dict[str, Any] = {
    "none (float32)": lambda: None,
    "two-sided, float16, ratio 160": lambda: learned(80),
    "two-sided, float16, ratio 64": lambda: learned(32),
    "PowerSGD of torch, rank 1": lambda: Torch(1),
    "PowerSGD of torch, rank 2": lambda: Torch(2),
    "PowerSGD of torch, rank 4": lambda: Torch(4),
    "PowerSGDCodec, rank 1": lambda: power(1),
    "PowerSGDCodec, rank 4": lambda: power(4),
    "PowerSGDCodec, rank 4, int8": lambda: power(4, int8=True),
}


class Block(nn.Module):
    """A residual block with GroupNorm (He et al. 2016; Wu & He 2018)."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out)),
        )
        self.skip = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.main(x) + self.skip(x))


class LitResNet(LightningModule):
    """A ResNet-8 on images halved by its first convolution."""

    def __init__(self, channels: int, steps: int, width: int = 32) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()),
            *(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(row: str, given: argparse.Namespace) -> dict[str, float]:
    """Train one row on this process and return its figures."""
    torch.set_num_threads(1)
    distributed._DEFAULT_FIRST_BUCKET_BYTES = BUCKET_MB << 20
    data = standardize(SOURCES[given.dataset]().load(Path(os.environ.get("FEDLIGHT_DATA", "data"))))
    x, y = data.x_train[: given.samples], data.y_train[: given.samples]
    steps = given.epochs * (len(y) // 2 // 32)
    torch.manual_seed(given.seed)
    module, callback = LitResNet(x.shape[1], steps, given.width), ROWS[row]()
    dim = sum(p.numel() for p in module.parameters())
    sent, whole = [0], distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return whole(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = DDPStrategy(bucket_cap_mb=BUCKET_MB)
    callbacks = [callback] if callback else []
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, max_epochs=-1, callbacks=callbacks, **quiet)
    try:
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=True))
    finally:
        distributed.all_reduce = whole
    total = callback.bytes if isinstance(callback, GradientCodes) else sent[0] if callback else 4 * dim * steps
    module.eval()
    with torch.no_grad():
        batches = zip(data.x_test.split(500), data.y_test.split(500), strict=True)
        right = sum(int((module.net(xs).argmax(1) == ys).sum()) for xs, ys in batches)
    return {
        "accuracy": 100 * right / len(data.y_test),
        "bytes": total / steps,
        "ratio": 4 * dim * steps / total,
        "steps": steps,
        "dim": dim,
    }


def main() -> None:
    """Print the table, or train all rows as one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=tuple(SOURCES), default="mnist")
    parser.add_argument("--samples", type=int, default=12000, help="training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name matches this regular expression")
    given = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(start_pair())
    if os.environ["LOCAL_RANK"] == "0":
        print("| gradients | bytes a step | ratio | test accuracy, % |\n|---|---|---|---|", flush=True)
    for row in ROWS:
        if re.search(given.only, row):
            r = train(row, given)
            if os.environ["LOCAL_RANK"] == "0":
                print(f"| {row} | {r['bytes']:,.0f} | {r['ratio']:.1f}x | {r['accuracy']:.2f} |", flush=True)
    if os.environ["LOCAL_RANK"] == "0":
        print(f"\n{r['steps']:.0f} steps of {r['dim']:,.0f} parameters, {given.samples} images of {given.dataset}")


def start_pair() -> int:
    """Start this script again as two processes that find each other, and return the worse exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    pair = [subprocess.Popen([sys.executable, *sys.argv], env={**common, "LOCAL_RANK": str(rank)}) for rank in range(2)]
    return max(abs(process.wait()) for process in pair)


if __name__ == "__main__":
    main()
