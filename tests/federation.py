"""Small federations that the tests of modules, callbacks and the command line share (also by class path, in YAML and subprocesses)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from fedlight.callbacks import CodecPretraining, FederatedCallback
from fedlight.clients import FedAvg, Sequential
from fedlight.codecs import AutoencoderCodec, ChainCodec, QuantizeCodec
from fedlight.core.layout import flatten
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.data import Arrays, ClientSampler, DataSource, Everyone, FederatedDataModule, build_arrays
from fedlight.modules import FederatedModule
from fedlight.modules.trainer import FederatedTrainer
from fedlight.rounds import Call, Reply

FEATURES, CLASSES = 6, 3


class Blobs(DataSource):
    """Gaussian clusters, one a class."""

    def __init__(self, samples: int = 300) -> None:
        self.samples = samples

    def load(self, root: Path) -> Arrays:
        rng = np.random.default_rng(0)
        y = rng.integers(CLASSES, size=self.samples + 60)
        x = (rng.normal(size=(len(y), FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[y]).astype(np.float32)
        return build_arrays(x[:-60], y[:-60], x[-60:], y[-60:], CLASSES, source=self.name)


class Fixed(ClientSampler):
    """The same clients every round, in the order given."""

    def __init__(self, clients: list[int]) -> None:
        self.clients = clients

    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        return np.array(self.clients, dtype=np.int64)


class Spy(FederatedCallback):
    """Remembers what passes the hooks."""

    def __init__(self) -> None:
        self.replies: dict[tuple[int, int, int], Reply] = {}
        self.sizes: dict[int, int] = {}  # bytes on the wire, by round
        self.clients: dict[int, list[int]] = {}
        self.broadcast: dict[int, dict[str, Any]] = {}
        self.totals: dict[int, Tensor] = {}
        self.aggregates: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}

    def on_client_message(self, trainer: Trainer, pl_module: LightningModule, round: Call, reply: Reply) -> None:
        number = round.context.round
        seen = reply.simulation
        kept = None if seen is None or seen.update is None else replace(seen, update=seen.update.clone())
        self.replies[number, round.context.attempt, reply.client] = replace(reply, buffers=reply.buffers.clone(), simulation=kept)
        weight = 4 if pl_module.weighting == "samples" else 0
        self.sizes[number] = self.sizes.get(number, 0) + len(reply.payload) + 4 * reply.buffers.numel() + weight
        self.clients.setdefault(number, []).append(reply.client)
        self.broadcast[number] = dict(round.context.broadcast)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        number = round.context.round
        self.totals[number] = round.codes.total.clone()
        self.aggregates[number] = round.aggregate.clone()
        self.weights[number] = weights_of(pl_module)


class CodeDump(FederatedCallback):
    """Writes the sum of codes and the aggregate of every round to a folder: the same file from one process and from two."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(round.codes.total, self.folder / f"round_{round.context.round}.pt")


class TrueDump(FederatedCallback):
    """Writes the first round's true aggregate to the run's folder."""

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        if round.context.round == 0 and round.observed.true is not None:
            torch.save(round.observed.true.mean(), Path(str(trainer.log_dir)) / "true.pt")


class Slow(FederatedCallback):
    """Makes rounds long enough to be interrupted, and says in a file how many are done."""

    def __init__(self, marker: str, seconds: float = 0.3, after: int = 4) -> None:
        self.marker = marker
        self.seconds = seconds
        self.after = after

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        import time

        Path(self.marker).write_text(str(round.context.round + 1))
        if round.context.round + 1 >= self.after:
            time.sleep(self.seconds)


class History(Logger):
    """A logger that keeps everything in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.setdefault(int(step or 0), {}).update(metrics)

    def rounds(self, name: str) -> dict[int, float]:
        """Return a metric by step."""
        return {step: metrics[name] for step, metrics in sorted(self.steps.items()) if name in metrics}


def mlp(hidden: int = 8, dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(FEATURES, hidden), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, CLASSES))


def learned(bits: int = 6) -> ChainCodec:
    """A learned code of integers."""
    return ChainCodec([AutoencoderCodec(ratio=2, block_size=16, width=4), QuantizeCodec(bits=bits)])


SHORT = CodecTraining(steps=4, check_every=2)


def pretraining() -> CodecPretraining:
    return CodecPretraining(ProxyFederation(rounds=10, clients=4, samples=10), SHORT)


def federated_data(**changes: Any) -> FederatedDataModule:
    return FederatedDataModule(**{"source": Blobs(), "num_clients": 8, "sampler": Everyone(), "proxy_samples": 40, "seed": 3} | changes)


def federated(network: nn.Module | None = None, **changes: Any) -> FederatedModule:
    settings = {"algorithm": FedAvg(lr=0.1, steps=3, batch_size=8), "seed": 3, "sim_every": 0, "engine": Sequential()}
    return FederatedModule(network or mlp(), **settings | changes)


def trainer(rounds: int = 2, **changes: Any) -> FederatedTrainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    return FederatedTrainer(**quiet | {"max_steps": rounds} | changes)


def run(module: FederatedModule, rounds: int = 2, data: FederatedDataModule | None = None, **changes: Any) -> Spy:
    """Train and return the spy that watched."""
    spy = Spy()
    callbacks = [*changes.pop("callbacks", []), spy, pretraining()]
    trainer(rounds, callbacks=callbacks, **changes).fit(module, datamodule=data or federated_data())
    return spy


def weights_of(module: Any) -> Tensor:
    """Return all trainable weights ``[dim]``."""
    return flatten(p for p in getattr(module, "network", module).parameters() if p.requires_grad)


def write_npz(path: Path, shape: tuple[int, ...] = (1, 8, 8), samples: int = 120, classes: int = 10, **changes: Any) -> Path:
    """Write a small image data set that ``ArrayFile`` reads."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", samples), ("test", 40)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % classes
    np.savez(path, **arrays | changes)
    return path


def write_speeches(path: Path, speakers: int = 4, speeches: int = 6) -> Path:
    """Write a small text of made-up speeches that ``SpeakerText`` reads; every speaker has words of their own."""
    rng = np.random.default_rng(0)
    words = [["".join(rng.choice(list("aeioulnrst"), 4)) for _ in range(6)] for _ in range(speakers)]
    parts = [f"SPEAKER {i}:\n{' '.join(rng.choice(words[i], 12))}.\n" for _ in range(speeches) for i in range(speakers)]
    path.write_text("\n".join(parts))
    return path


TINY = [
    *("--data.num_clients", "6", "--data.sampler", "Uniform", "--data.sampler.cohort_size", "3", "--data.proxy_samples", "60"),
    *("--model.network", "fedlight.modules.MLP", "--model.network.in_features", "64", "--model.network.hidden", "[4]"),
    *("--model.network.num_classes", "10", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--model.engine", "Sequential"),  # the same bits in every run
    *("--pretraining.proxy.rounds", "10", "--pretraining.proxy.clients", "3", "--pretraining.proxy.samples", "12"),
    *("--pretraining.training.steps", "4", "--pretraining.training.check_every", "2"),
]
"""Options that make any run on Digits take about a second."""

CODEC = json.dumps(
    {
        "class_path": "ChainCodec",
        "init_args": {
            "codecs": [
                {"class_path": "AutoencoderCodec", "init_args": {"ratio": 3, "block_size": 32, "width": 4}},
                {"class_path": "QuantizeCodec", "init_args": {"bits": 6}},
            ]
        },
    }
)


def invoke(command: str, folder: Path, *options: str) -> None:
    """Run the command line in this process, with ``TINY``; warnings about that are Lightning's."""
    from fedlight.cli import main

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main([command, *TINY, "--trainer.default_root_dir", str(folder), *options])


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all runs under ``folder``, in the order in which they were begun."""
    return sorted((path.parent for path in folder.rglob("config.yaml")), key=lambda run: (run / "config.yaml").stat().st_mtime_ns)


def environment() -> dict[str, str]:
    """Return the environment of a subprocess: one thread, and this module importable."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def heavy_imports(code: str) -> set[str]:
    """Return which packages that take seconds to import are loaded after ``code``, in an interpreter of its own."""
    heavy = {"lightning", "torchvision", "torchmetrics", "tensorboard", "sklearn"}
    shown = f"import sys\n{code}\nprint(*({{name.split('.')[0] for name in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", shown], env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
