"""B1 and B2: rounds per second of fedlight, as `fedlight fit` runs it, beside the bare loop. Both in one process, in turn."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bare import BareLoop, ClientTurn
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from terminal import pseudo_terminal
from torch import nn

from fedlight.callbacks import RoundCheckpoint, RoundProgressBar, RunSummary
from fedlight.cli import run_loggers
from fedlight.clients import FedAvg
from fedlight.core.layout import flatten
from fedlight.core.random import derive_seed, torch_generator
from fedlight.data import IID, ArrayFile, DataSource, FederatedDataModule, Uniform
from fedlight.data.arrays import Arrays, build_arrays
from fedlight.modules import BenchmarkCNN, FederatedModule
from fedlight.modules.trainer import FederatedTrainer

CIFAR_FILE = "cifar10_20k.npz"
CLIENTS, SAMPLES, COHORT, BATCH, LR = 400, 50, 50, 10, 0.1
STEPS = COHORT * SAMPLES // BATCH  # client steps in a round


@dataclass(frozen=True)
class Workload:
    """A model and how many rounds are timed in one repeat, after ``warm`` rounds that are not."""

    title: str
    network: Callable[[], nn.Module]
    rounds: int
    warm: int


def linear() -> nn.Module:
    """Return B1's model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


WORKLOADS = {
    "b1": Workload("B1 linear(3072, 10)", linear, rounds=60, warm=5),
    "b2": Workload("B2 BenchmarkCNN", BenchmarkCNN, rounds=5, warm=1),
}


class RandomImages(DataSource):
    """Random images of CIFAR-10's shape, for a machine without the data: the same work, meaningless accuracy."""

    def load(self, root: Path) -> Arrays:
        """Return the images; ``root`` is not used."""
        rng = np.random.default_rng(0)
        n, m = CLIENTS * SAMPLES, 100
        images = [rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8) for size in (n, m)]
        labels = [rng.permutation(np.arange(size) % 10) for size in (n, m)]
        return build_arrays(images[0], labels[0], images[1], labels[1], 10, source=self.name)


def load_data() -> FederatedDataModule:
    """Return 400 clients of 50 samples: CIFAR-10 if the data root has it, else random images."""

    def make(source: DataSource) -> FederatedDataModule:
        return FederatedDataModule(source, IID(), num_clients=CLIENTS, sampler=Uniform(COHORT), proxy_fraction=0.0)

    cifar = make(ArrayFile(CIFAR_FILE))
    data = cifar if (cifar.root / CIFAR_FILE).exists() else make(RandomImages())
    data.setup()
    sizes = {data.client_size(client) for client in range(CLIENTS)}
    assert sizes == {SAMPLES}, f"expected clients of {SAMPLES} samples but got {sorted(sizes)}"
    return data


class RoundClock(Callback):
    """Times the rounds after the first few, with everything that happens between them.

    First in the list of callbacks: it starts before the others hear of a round and stops after the last one's checkpoint.
    """

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start when the warm-up is over."""
        if batch_idx == self.warm:
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds += time.perf_counter()


def run_fedlight(work: Workload, network: nn.Module, data: FederatedDataModule, folder: str) -> tuple[float, torch.Tensor]:
    """Return the seconds of ``work.rounds`` rounds and the final weights ``[dim]``: the Trainer is what `fedlight fit` makes."""
    seed_everything(0, workers=True, verbose=False)
    clock = RoundClock(work.warm)
    every = min(10, work.rounds)  # at least one checkpoint falls into a repeat
    trainer = FederatedTrainer(
        accelerator="cpu",
        max_steps=work.warm + work.rounds,
        max_epochs=-1,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        val_check_interval=10,
        enable_model_summary=False,
        logger=run_loggers("benchmark", folder),
        default_root_dir=folder,
        callbacks=[clock, RunSummary(), LearningRateMonitor("step"), RoundProgressBar(), RoundCheckpoint(every)],
    )
    module = FederatedModule(network, algorithm=FedAvg(lr=LR, batch_size=BATCH, epochs=1), sim_every=0)
    trainer.fit(module, datamodule=data)
    return clock.seconds, flatten(module.trainable())


def plan_rounds(data: FederatedDataModule, rounds: int) -> list[list[ClientTurn]]:
    """Return the clients, batch orders and dropout seeds that fedlight draws in its first rounds."""

    def turn(number: int, client: int) -> ClientTurn:
        order = torch.randperm(SAMPLES, generator=torch_generator(0, number, 0, client, "batches"))
        rows = torch.from_numpy(data.client_indices(client))[order]
        return ClientTurn(rows, derive_seed(0, number, 0, client, "dropout"))

    return [[turn(number, int(client)) for client in data.cohort(number)] for number in range(rounds)]


def run_bare(work: Workload, network: nn.Module, data: FederatedDataModule) -> tuple[float, torch.Tensor]:
    """Return the seconds of the same rounds in the bare loop, and its final weights ``[dim]``."""
    plan = plan_rounds(data, work.warm + work.rounds)
    loop = BareLoop(network, data.x, data.y, LR, BATCH)
    loop.run(plan[: work.warm])
    start = time.perf_counter()
    loop.run(plan[work.warm :])
    return time.perf_counter() - start, loop.weights


def measure(name: str, repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each system, and notes on what was measured.

    Raises:
        AssertionError: if the two systems did not do the same work, that is if their weights differ.
    """
    work, data = WORKLOADS[name], load_data()
    torch.manual_seed(0)
    network = work.network()
    seconds: dict[str, list[float]] = {"fedlight": [], "bare loop": []}
    with TemporaryDirectory() as folder, pseudo_terminal(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for repeat in range(repeats + 1):  # the first warms up
            ours, weights = run_fedlight(work, copy.deepcopy(network), data, folder)
            bare, bare_weights = run_bare(work, copy.deepcopy(network), data)
            error = float((weights - bare_weights).norm() / (weights - flatten(network.parameters())).norm())
            assert error < 1e-3, f"fedlight and the bare loop did different work: their weights differ by {error:.1e} of the way"
            if repeat:
                seconds["fedlight"].append(ours)
                seconds["bare loop"].append(bare)
    ratio = statistics.median(bare / ours for ours, bare in zip(seconds["fedlight"], seconds["bare loop"], strict=True))
    rows = [row(work, system, times, ratio if system == "fedlight" else 1.0) for system, times in seconds.items()]
    return rows, [f"{work.title}: {data.source.name}, final weights equal to {error:.0e} of the distance travelled."]


def row(work: Workload, system: str, seconds: list[float], ratio: float) -> dict[str, Any]:
    """Return one system's row: medians of its repeats, which are kept in ``runs`` (rounds per second)."""
    rate = work.rounds / statistics.median(seconds)
    return {
        "benchmark": work.title,
        "system": system,
        "client_steps_per_second": rate * STEPS,
        "rounds_per_second": rate,
        "ratio_to_bare": ratio,
        "peak_rss_mb": None,  # both run in one process
        "runs": [work.rounds / each for each in seconds],
    }
