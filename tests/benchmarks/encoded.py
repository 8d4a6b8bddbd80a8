"""Rounds per second with a learned code of 128 times fewer bytes beside those without a codec: `python tests/benchmarks/encoded.py`.

Each is a whole `fedlight fit`: messages serialised, loggers, progress bar and checkpoints, on B2's CNN and on the MNIST setting (LeNet-5,
10 clients a round, 10 steps of 32). The codec is fitted before the clock starts. Runs alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from terminal import pseudo_terminal
from throughput import BATCH, CIFAR_FILE, COHORT, LR, make_trainer, quiet
from torch import nn

from fedlight.callbacks import CodecPretraining
from fedlight.clients import FedAvg
from fedlight.codecs import ChainCodec, QuantizeCodec, TwoSidedCodec
from fedlight.core.codec import Codec
from fedlight.core.pretraining import ProxyFederation
from fedlight.data import IID, ArrayFile, Dirichlet, FederatedDataModule, Torchvision, Uniform
from fedlight.modules import BenchmarkCNN, FederatedModule, LeNet5

RECORDED = ProxyFederation(rounds=10, clients=4)
NEEDED = 0.9  # of the rounds per second without a codec

CODECS: dict[str, Callable[[], Codec | None]] = {
    "identity": lambda: None,
    "two-sided, 4 bits, 128x": lambda: ChainCodec([TwoSidedCodec(16), QuantizeCodec(4)]),
}


@dataclass(frozen=True)
class Setting:
    """A model, its federation, and how many rounds are timed after ``warm`` ones that are not."""

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[], FederatedDataModule]
    algorithm: FedAvg
    rounds: int
    warm: int


SETTINGS = {
    "b2": Setting(
        "B2 BenchmarkCNN",
        BenchmarkCNN,
        lambda: FederatedDataModule(ArrayFile(CIFAR_FILE), IID(), num_clients=360, sampler=Uniform(COHORT), proxy_samples=2000),
        FedAvg(lr=LR, batch_size=BATCH, epochs=1),
        rounds=4,
        warm=1,
    ),
    "mnist": Setting(
        "MNIST LeNet-5",
        LeNet5,
        lambda: FederatedDataModule(Torchvision("MNIST"), Dirichlet(0.5), num_clients=100, sampler=Uniform(10), proxy_samples=2000),
        FedAvg(lr=0.05, batch_size=32, steps=10),
        rounds=30,
        warm=3,
    ),
}


class Stopwatch(Callback):
    """Times the rounds after the first ``warm``; first of the callbacks, so that what others do after a round counts."""

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.begin = self.end = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock when the warm-up is over."""
        if batch_idx == self.warm:
            self.begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.end = time.perf_counter()


def run(setting: Setting, data: FederatedDataModule, codec: Codec | None) -> float:
    """Return the rounds per second of one run."""
    seed_everything(0, workers=True, verbose=False)
    watch = Stopwatch(setting.warm)
    module = FederatedModule(setting.network(), codec, algorithm=setting.algorithm, sim_every=0)
    with TemporaryDirectory() as folder, pseudo_terminal(), quiet():
        trainer = make_trainer(watch, setting.warm + setting.rounds, setting.rounds, folder, [CodecPretraining(RECORDED)])
        trainer.fit(module, datamodule=data)
    return setting.rounds / (watch.end - watch.begin)


def main() -> None:
    """Run what was asked for, show it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SETTINGS), help="comma-separated, of b2 and mnist (default: both)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each codec, in turn, of which the median is taken (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmarks"), help="folder of encoded.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.only.split(","):
        setting = SETTINGS[name]
        data = setting.data()
        rates: dict[str, list[float]] = {codec: [] for codec in CODECS}
        for _ in range(arguments.repeats):
            for codec, make in CODECS.items():
                rates[codec].append(run(setting, data, make()))
        for codec, found in rates.items():
            ratio = statistics.median(mine / plain for mine, plain in zip(found, rates["identity"], strict=True))
            rows.append(
                {"benchmark": setting.title, "system": codec, "rounds_per_second": statistics.median(found), "ratio": ratio, "runs": found}
            )
            verdict = "" if codec == "identity" else f"   wanted {NEEDED}: {'met' if ratio >= NEEDED else 'NOT met'}"
            print(f"{setting.title:18} {codec:26} {statistics.median(found):7.3f} rounds/s   {ratio:5.2f} of identity{verdict}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "encoded.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
