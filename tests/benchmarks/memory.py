"""B4: one federated run in a process of its own, to see the peak of its memory. Prints one line of JSON.

python tests/benchmarks/memory.py --cohort 1000
"""

from __future__ import annotations

import argparse
import json
from tempfile import TemporaryDirectory
from typing import Any

import torch
from resident import peak_rss_mb
from throughput import RandomImages, quiet

from fedlight.clients import FedAvg
from fedlight.data import IID, DataSource, FederatedDataModule, Torchvision, Uniform
from fedlight.modules import MLP, FederatedModule
from fedlight.modules.trainer import FederatedTrainer

CLIENTS = 10_000


def load_data(cohort: int) -> FederatedDataModule:
    """Return 10,000 clients of MNIST if the data root has it (6 samples each), else of random images (2 each)."""

    def make(source: DataSource) -> FederatedDataModule:
        return FederatedDataModule(source, IID(), num_clients=CLIENTS, sampler=Uniform(cohort), proxy_fraction=0.0)

    data = make(Torchvision("MNIST", download=False))
    return data if (data.root / "MNIST" / "raw").exists() else make(RandomImages((1, 28, 28)))


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


def main() -> None:
    """Run once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=int, default=10, help="clients in a round, up to 10,000")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 for torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(json.dumps(run(arguments.cohort, arguments.rounds)))


if __name__ == "__main__":
    main()
