"""What a run chooses by itself beside each engine and number of threads that it could: `python tests/benchmarks/automatic.py`.

One run, whose rounds take turns: each is trained with another engine and number of threads, so that what else the machine does hits all
alike. Then the trial of a run, several times: what it chooses, how its choice compares with the best, and what it costs. In two processes
each has one thread. Writes `automatic.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from throughput import BATCH, CIFAR_FILE, CLIENTS, COHORT, LR

from fedlight.cli import open_cli
from fedlight.console.values import prepare
from fedlight.core.process import cores_of_a_process
from fedlight.federated_cli import FederatedCLI
from fedlight.modules.engines import choose_engine, choose_threads

CIFAR = [
    *("--data.source", "ArrayFile", "--data.source.path", CIFAR_FILE, "--data.num_clients", str(CLIENTS), "--data.proxy_fraction", "0"),
    *("--data.sampler", "Uniform", "--data.sampler.cohort_size", str(COHORT), "--data.partitioner", "IID", "--model.sim_every", "0"),
    *("--model.algorithm", "FedAvg", "--model.algorithm.lr", str(LR), "--model.algorithm.batch_size", str(BATCH)),
    *("--model.algorithm.epochs", "1", "--model.algorithm.steps", "null"),
]
LINEAR = ["--model.network", "fedlight.MLP", "--model.network.in_features", "3072", "--model.network.hidden", "[]"]
SHIPPED = ["--model.engine", "null", "--threads", "null"]
WORKLOADS: dict[str, tuple[str, int, list[str]]] = {
    "b1": ("B1 linear(3072, 10)", 25, [*CIFAR, *LINEAR, "--model.network.num_classes", "10"]),
    "b2": ("B2 BenchmarkCNN", 3, [*CIFAR, "--model.network", "fedlight.modules.BenchmarkCNN"]),
    "digits": ("digits", 40, ["--config", "digits", *SHIPPED]),
    "mnist": ("MNIST, LeNet-5", 10, ["--config", "mnist_transform", *SHIPPED]),
}
"""Title, rounds of each setting, and options."""


class Turns(Callback):
    """Trains every round with the next of the settings and times it, then lets the run choose again, ``trials`` times.

    A setting whose first round takes more than four times the best one's takes no further part.
    """

    def __init__(self, rounds: int, trials: int, threads: Sequence[int]) -> None:
        self.rounds = rounds
        self.trials = trials
        self.threads = threads
        self.seconds: dict[tuple[str, int], list[float]] = {}
        self.chosen: Counter[tuple[str, int]] = Counter()
        self.cost: list[float] = []
        self.order: list[tuple[str, int]] = []
        self.first: dict[tuple[str, int], float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See which engines there are."""
        self.order = [(name, count) for count in self.threads for name in pl_module.engine.candidates if name != "Threaded" or count == 1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the next setting."""
        kept = [*self.seconds] or self.order
        self.now = self.order[batch_idx] if batch_idx < len(self.order) else kept[batch_idx % len(kept)]
        pl_module.engine.chosen, count = self.now
        torch.set_num_threads(count)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time of a round; the first of each setting warms up, and says whether there are more of it."""
        taken = time.perf_counter() - self.start
        if batch_idx < len(self.order):
            self.first[self.now] = taken
            if batch_idx + 1 == len(self.order):
                self.seconds = {setting: [] for setting, one in self.first.items() if one <= 4 * min(self.first.values())}
            return
        self.seconds[self.now].append(taken)
        trainer.should_stop = all(len(found) >= self.rounds for found in self.seconds.values())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Choose again, as at the start of a run."""
        for _ in range(self.trials):
            torch.set_num_threads(max(self.threads))
            start, pl_module.engine.chosen = time.perf_counter(), ""
            count = choose_threads(pl_module) or 1
            torch.set_num_threads(count)
            choose_engine(pl_module)
            self.cost.append(time.perf_counter() - start)
            self.chosen[pl_module.engine.chosen, 1 if pl_module.engine.chosen == "Threaded" else count] += 1


def measure(name: str, rounds: int, trials: int, processes: int) -> str:
    """Run one workload and return its lines of the table."""
    title, usual, options = WORKLOADS[name]
    turns = Turns(rounds or usual, trials, [1] if processes > 1 else sorted({1, cores_of_a_process()}))

    class Turning(FederatedCLI):
        def instantiate_trainer(self, **settings: Any) -> Trainer:
            made = super().instantiate_trainer(**settings)
            made.callbacks.insert(0, turns)  # type: ignore[attr-defined]
            return made

        def after_fit(self) -> None:
            pass

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = ["--trainer.default_root_dir", folder, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
        flags += ["--trainer.max_steps", "100000", "--trainer.limit_val_batches", "0", "--trainer.devices", str(processes)]
        flags += ["--trainer.strategy", "ddp"] if processes > 1 else []
        cli = open_cli(Turning, prepare(["fit", *options, *flags]))
    return table(title, processes, turns) if cli.trainer.is_global_zero else ""


def table(title: str, processes: int, turns: Turns) -> str:
    """Return the lines of a workload: a round's median seconds by each setting, and how the choices compare with the best."""
    medians = {setting: statistics.median(turns.seconds.get(setting) or [one]) for setting, one in turns.first.items()}
    best = min(medians, key=lambda setting: medians[setting])
    lines = [
        f"**{title}**, {processes} process{'es' if processes > 1 else ''}, {turns.rounds} rounds of each (one, where that was far behind)",
        "",
    ]
    lines += ["| engine | threads | milliseconds a round | speed, of the best | chosen |", "|---|---|---|---|---|"]
    for (name, count), median in medians.items():
        times = turns.chosen[name, count]
        lines.append(f"| {name} | {count} | {1000 * median:.1f} | {medians[best] / median:.2f} | {times} of {turns.trials} |")
    typical = turns.chosen.most_common(1)[0][0]
    share = medians[best] / medians[typical]
    lines += ["", f"Chosen most often: {typical[0]}, {typical[1]} threads, {share:.2f} of the best. A trial took "]
    lines[-1] += f"{statistics.median(turns.cost):.2f} s, as long as {statistics.median(turns.cost) / medians[typical]:.1f} rounds.\n"
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for, each workload in a process of its own, show it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="comma-separated workloads (default: all)")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each setting (default: by workload)")
    parser.add_argument("--trials", type=int, default=5, help="how often to choose (default: 5)")
    parser.add_argument("--processes", default="1,2", help="comma-separated numbers of processes (default: 1,2)")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmarks"), help="folder of automatic.md")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(measure(given.only, given.rounds, given.trials, int(given.processes)), flush=True)
        return
    variables = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    texts = []
    for name in given.only.split(","):
        for processes in given.processes.split(","):
            own = ["--only", name, "--rounds", str(given.rounds), "--trials", str(given.trials), "--processes", processes, "--alone"]
            done = subprocess.run([sys.executable, __file__, *own], env=variables, stdout=subprocess.PIPE, text=True, check=True)
            texts.append(done.stdout.strip())
            print(texts[-1] + "\n", flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "automatic.md").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
