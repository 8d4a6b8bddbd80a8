"""Runs under differential privacy that are killed (SIGKILL) at any moment: how many sums were opened, and how many the ledger knows.

Run ``python -m tests.benchmarks.kills --runs 25``. A run says in a file when a sum has been opened; a moment after a drawn one it is
killed, and then goes on from its checkpoint. The law: the ledger on the disk, and that of the run that goes on, has every sum.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from fedlight.callbacks import FederatedCallback
from fedlight.core.checkpoint import read_checkpoint
from fedlight.privacy.ledger import JOURNAL
from fedlight.rounds.call import Call
from tests.federation import invoke, run_folders
from tests.processes import fork, wait_until

SUMS = {
    "CentralDP": (
        *("--model.privacy", json.dumps({"class_path": "CentralDP", "init_args": {"clip": 0.5, "noise_multiplier": 1.0, "delta": 0.01}})),
        *("--data.sampler", json.dumps({"class_path": "Poisson", "init_args": {"rate": 0.5}})),
    ),
    "DistributedDP behind secure aggregation": (
        "--model.privacy",
        json.dumps({"class_path": "DistributedDP", "init_args": {"clip": 0.5, "threshold": 4, "noise_multiplier": 1.0, "delta": 0.01}}),
        *("--data.sampler", "Everyone"),
        *("--model.codec", json.dumps({"class_path": "TwoSidedCodec", "init_args": {"ratio": 2}})),
        *("--model.aggregator", json.dumps({"class_path": "SecureAggregator", "init_args": {"cohort": 6, "threshold": 5}})),
    ),
}


class Opened(FederatedCallback):
    """Writes a line to a file when a sum has been opened, which may be as soon as its clients answered."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def on_cohort_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        number = os.open(self.marker, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(number, b"\n")
        os.close(number)


@dataclass(frozen=True)
class Killed:
    """How many sums a killed run opened; how many its journal, its checkpoint and the run that goes on know before their next."""

    opened: int
    journal: int
    checkpoint: int
    resumed: int


def kill(folder: Path, draw: random.Random, privacy: str) -> Killed:
    """Kill a run at a drawn moment, go on from its checkpoint for one round, and count."""
    marker = folder / "opened"
    options = [*SUMS[privacy], "--data.normalize", "false", "--checkpoint.every_n_rounds", "2", "--trainer.val_check_interval", "1000"]
    watched = ["--trainer.callbacks", "tests.benchmarks.kills.Opened", "--trainer.callbacks.marker", str(marker)]
    process = fork(lambda: invoke("fit", folder, *options, *watched, "--trainer.max_steps", "100000"), folder / "output.txt")
    first = draw.randint(1, 12)
    wait_until(lambda: process.poll() is not None or (marker.exists() and marker.stat().st_size >= first), [process])
    time.sleep(draw.random() * 0.06)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.last_words()
    (run,) = run_folders(folder)
    journal = (run / JOURNAL).read_text().count("\n")
    last = run / "checkpoints" / "last.ckpt"
    saved = read_checkpoint(last)
    known = sum(times for *_, times in saved["fedlight"]["privacy"]["ledger"]["lines"])
    rounds = saved["global_step"] + 1
    again = fork(
        lambda: invoke("fit", folder, *options, "--trainer.max_steps", str(rounds), "--ckpt_path", str(last)), folder / "again.txt"
    )
    assert again.wait() == 0, again.last_words()
    summary: dict[str, Any] = json.loads((run_folders(folder)[1] / "summary.json").read_text())
    return Killed(marker.stat().st_size, journal, known, summary["privacy"]["rounds"] - 1)


def main() -> None:
    """Kill, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=25, help="killed runs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for privacy in SUMS:
        draw, counts = random.Random(options.seed), []
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                counts.append(kill(Path(folder), draw, privacy))
        opened, journal, checkpoint, resumed = (sum(getattr(one, name) for one in counts) for name in vars(counts[0]))
        holes = sum(min(one.journal, one.resumed) < one.opened for one in counts)
        print(
            f"{privacy}: {len(counts)} runs killed, {opened} sums opened, {checkpoint} known to checkpoints, {journal} in ledgers on the "
            f"disk, {resumed} in those of the runs that went on; runs with a hole: {holes}",
            flush=True,
        )


if __name__ == "__main__":
    main()
