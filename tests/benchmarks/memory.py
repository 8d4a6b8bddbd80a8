"""B4: one federated run in a process of its own, to see the peak of its memory. Prints one line of JSON.

python tests/benchmarks/memory.py --cohort 1000
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from throughput import quiet

from fedlight.clients import FedAvg
from fedlight.data import IID, DataSource, Digits, FederatedDataModule, Torchvision, Uniform
from fedlight.modules import MLP, FederatedModule
from fedlight.modules.trainer import FederatedTrainer

CLIENTS = 1000


def load_data(cohort: int) -> FederatedDataModule:
    """Return 1,000 clients of MNIST if the data root has it, else of the digits."""

    def make(source: DataSource) -> FederatedDataModule:
        return FederatedDataModule(source, IID(), num_clients=CLIENTS, sampler=Uniform(cohort), proxy_fraction=0.0)

    data = make(Torchvision("MNIST", download=False))
    return data if (data.root / "MNIST" / "raw").exists() else make(Digits())


def run(cohort: int, rounds: int) -> dict[str, Any]:
    """Run rounds of a cohort and return the peak of resident memory in MB, beside what keeping every update would take."""
    data = load_data(cohort)
    data.setup()
    # Large enough that a server which kept the updates of a cohort of 1,000 would more than show.
    pixels = data.x[0].numel()
    network = MLP(pixels, [160_000 // (pixels + 11)], data.num_classes)
    module = FederatedModule(network, algorithm=FedAvg(lr=0.1, batch_size=32, epochs=1), sim_every=0)
    with TemporaryDirectory() as folder, quiet():
        trainer = FederatedTrainer(
            accelerator="cpu",
            max_steps=rounds,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
    return {"data": data.source.name, "peak_rss_mb": peak_rss_mb(), "cohort_mb": cohort * module.layout.dim * 4 / 1e6}


def peak_rss_mb() -> float:
    """Return the peak of this process's resident memory in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss also covers the process that this one was started from
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main() -> None:
    """Run once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=int, default=10, help="clients in a round, up to 1,000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 for torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(json.dumps(run(arguments.cohort, arguments.rounds)))


if __name__ == "__main__":
    main()
