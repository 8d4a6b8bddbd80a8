"""B1 and B2: rounds per second of fedlight, as `fedlight fit` runs it, beside the bare loop. Both in one process, in turn."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from fedlight.clients import Engine, FedAvg
from fedlight.clients.layers import quicken_pooling
from fedlight.core.layout import flatten
from fedlight.core.random import derive_seed, torch_generator
from fedlight.data import IID, ArrayFile, DataSource, FederatedDataModule, Uniform
from fedlight.data.arrays import Arrays, build_arrays
from fedlight.federated_cli import run_loggers
from fedlight.modules import BenchmarkCNN, FederatedModule
from fedlight.modules.trainer import FederatedTrainer

CIFAR_FILE = "cifar10_20k.npz"
CLIENTS, SAMPLES, COHORT, BATCH, LR = 400, 50, 50, 10, 0.1
STEPS = COHORT * SAMPLES // BATCH  # client steps in a round


@dataclass(frozen=True)
class Workload:
    """A model and how many rounds are timed in one repeat, in blocks, after ``warm`` rounds that are not."""

    title: str
    network: Callable[[], nn.Module]
    rounds: int
    warm: int
    block: int


def linear() -> nn.Module:
    """Return B1's model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


WORKLOADS = {
    "b1": Workload("B1 linear(3072, 10)", linear, rounds=60, warm=5, block=5),
    "b2": Workload("B2 BenchmarkCNN", BenchmarkCNN, rounds=5, warm=2, block=1),
}


class RandomImages(DataSource):
    """Random images of a shape (CIFAR-10's if not given), for a machine without the data: the same work, meaningless accuracy."""

    def __init__(self, shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        self.shape = shape

    def load(self, root: Path) -> Arrays:
        """Return the images; ``root`` is not used."""
        rng = np.random.default_rng(0)
        n, m = CLIENTS * SAMPLES, 100
        images = [rng.integers(0, 256, (size, *self.shape), dtype=np.uint8) for size in (n, m)]
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


class Alternation(Callback):
    """Lets fedlight and the bare loop take turns, a block of the same rounds each, and times both: noise hits them alike.

    First in the list of callbacks, so that everything other callbacks do in a block falls into its time.

    Attributes:
        ours: seconds of fedlight, a number for each block.
        bare: seconds of the bare loop, likewise.
        error: distance of the two weight vectors after the first round, as a share of the distance travelled.
    """

    def __init__(self, loop: BareLoop, plan: Sequence[Sequence[ClientTurn]], work: Workload) -> None:
        self.loop = loop
        self.plan = plan
        self.tasks = {1, *range(work.warm, work.warm + work.rounds, work.block)}
        self.done = 0
        self.resumed = 0.0
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.error = math.nan
        self.start = loop.weights.clone()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the bare loop its turn where a block ends; ``batch_idx`` rounds are done."""
        if batch_idx in self.tasks:
            self._turn(pl_module, batch_idx)
        elif not batch_idx:
            self.resumed = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last block."""
        self._turn(pl_module, len(self.plan))

    def _turn(self, module: LightningModule, done: int) -> None:
        begin = time.perf_counter()
        self.loop.run(self.plan[self.done : done])
        end = time.perf_counter()
        self.ours.append(begin - self.resumed)
        self.bare.append(end - begin)
        if done == 1:
            ours = flatten(module.network.parameters())  # type: ignore[union-attr]
            self.error = float((ours - self.loop.weights).norm() / (ours - self.start).norm())
        self.done = done
        self.resumed = time.perf_counter()


def plan_rounds(data: FederatedDataModule, rounds: int) -> list[list[ClientTurn]]:
    """Return the clients, batch orders and dropout seeds that fedlight draws in its first rounds."""

    def task(number: int, client: int) -> ClientTurn:
        order = torch.randperm(SAMPLES, generator=torch_generator(0, number, 0, client, "batches"))
        rows = torch.from_numpy(data.train_partition[client])[order]
        return ClientTurn(rows, derive_seed(0, number, 0, client, "dropout"))

    return [[task(number, int(client)) for client in data.cohort(number)] for number in range(rounds)]


def make_trainer(first: Callback, rounds: int, repeat: int, folder: str, more: Sequence[Callback] = (), **flags: Any) -> FederatedTrainer:
    """Return the Trainer that `fedlight fit` makes, a callback before all others; at least one checkpoint falls into ``repeat`` rounds."""
    return FederatedTrainer(
        accelerator="cpu",
        max_steps=rounds,
        max_epochs=-1,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        val_check_interval=10,
        enable_model_summary=False,
        logger=run_loggers("benchmark", folder, "fedlight"),
        default_root_dir=folder,
        callbacks=[first, RunSummary(), LearningRateMonitor("step"), RoundProgressBar(), RoundCheckpoint(min(10, repeat)), *more],
        **flags,
    )


def make_module(network: nn.Module, engine: Engine | None = None) -> FederatedModule:
    """Return the module: FedAvg without a codec."""
    return FederatedModule(network, algorithm=FedAvg(lr=LR, batch_size=BATCH, epochs=1), sim_every=0, engine=engine)


def run_once(work: Workload, data: FederatedDataModule, folder: str) -> tuple[float, float]:
    """Return the seconds that fedlight and the bare loop took for ``work.rounds`` rounds.

    Raises:
        AssertionError: if the two did not do the same work, that is if their weights differ after a round.
    """
    seed_everything(0, workers=True, verbose=False)
    network = work.network()
    loop = BareLoop(copy.deepcopy(network), data.x, data.y, LR, BATCH)
    quicken_pooling(loop.network)  # as fedlight does
    rounds = work.warm + work.rounds
    alternation = Alternation(loop, plan_rounds(data, rounds), work)
    trainer = make_trainer(alternation, rounds, work.rounds, folder)
    module = make_module(network)
    trainer.fit(module, datamodule=data)
    assert alternation.error < 1e-3, f"expected equal weights after a round but they differ by {alternation.error:.0e} of the way"
    return sum(alternation.ours[2:]), sum(alternation.bare[2:])  # without the first round and the warm-up


def measure(name: str, repeats: int) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each system, and a line on the data."""
    work, data = WORKLOADS[name], load_data()
    with TemporaryDirectory() as folder, pseudo_terminal(), quiet():
        times = [run_once(work, data, folder) for _ in range(repeats + 1)][1:]  # the first warms up
    ratio = statistics.median(bare / ours for ours, bare in times)
    rows = [row(work, "fedlight", [ours for ours, _ in times], ratio), row(work, "bare loop", [bare for _, bare in times], 1.0)]
    return rows, f"{work.title}: {data.source.name}, {len(data.y):,} samples"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notices off the terminal."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


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
