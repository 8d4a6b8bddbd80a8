"""What the learned codec makes of recorded updates, beside PCA and a random projection of the same size.

    python tests/benchmarks/pretraining.py [--dataset mnist|digits]

Prints three tables and writes them to logs/benchmarks/pretraining.json:
1. the linear autoencoder from a random start against PCA, on the bank both were fitted to (same blocks, no bias, whole cohorts);
2. linear and non-linear autoencoders, PCA and random projection on rounds that none of them saw;
3. the error of each by cohort size, on newly recorded rounds of 100 clients.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedlight.clients import FedAvg, LocalModel, record_bank
from fedlight.codecs import AutoencoderCodec, LinearCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.pretraining import CodecTraining
from fedlight.core.random import derive_seed
from fedlight.data import FederatedDataModule, Torchvision, Uniform
from fedlight.modules import MLP, LeNet5
from fedlight.modules.pretraining import errors_by_cohort, layer_trainer, reconstruction_error

CPU = torch.device("cpu")


def federation(dataset: str) -> tuple[FederatedDataModule, torch.nn.Module, FedAvg, int]:
    """Return data, network, local training and block size of the shipped configuration of this data set."""
    torch.manual_seed(0)
    if dataset == "mnist":
        data = FederatedDataModule(Torchvision("MNIST"), num_clients=100, sampler=Uniform(10), proxy_samples=2000)
        return data, LeNet5(), FedAvg(lr=0.05, batch_size=32, steps=10), 400
    return FederatedDataModule(), MLP(64, [64, 32], 10), FedAvg(lr=0.1, batch_size=16, steps=10), 128


def record(data: FederatedDataModule, network: torch.nn.Module, algorithm: FedAvg, rounds: int, clients: int, seed: int) -> UpdateBank:
    """Return a bank recorded on the proxy data."""
    model = LocalModel(network, lambda net, x, y: torch.nn.functional.cross_entropy(net(x), y))
    assert data.proxy is not None
    samples = len(data.y) // data.num_population
    start = (model.weights.clone(), model.buffers.clone())
    return record_bank(model, *start, algorithm, data.proxy, data.num_classes, rounds, clients, samples, 0.5, derive_seed(seed, "proxy"))


def fit(codec: Codec, bank: UpdateBank, stop: UpdateBank, training: CodecTraining) -> Codec:
    """Fit a codec with an early stop on ``stop``."""
    codec.fit(bank, layer_trainer(training, stop, CPU, None, False, 0))
    return codec


def main() -> None:
    """Run the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["mnist", "digits"], default="mnist" if os.environ.get("FEDLIGHT_DATA") else "digits")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the autoencoders")
    parser.add_argument("--linear-steps", type=int, default=8000, help="training steps of the linear one from a random start")
    arguments = parser.parse_args()
    data, network, algorithm, block = federation(arguments.dataset)
    data.prepare_data()
    data.setup()
    bank = record(data, network, algorithm, 40, 10, seed=0)
    fitted, rest = bank.split(0.2)
    stop, report = rest.split(0.5)
    same = {"ratio": 8.1, "block_size": block}

    whole = CodecTraining(
        steps=arguments.linear_steps, lr=3e-3, all_clients=True, relative=False, patience=1000, rounds_per_step=8, check_every=1000
    )
    # A linear code of whole cohorts is the code of their means: training on the means is the same training, ten times faster.
    means = UpdateBank(fitted.updates.mean(1, keepdim=True), fitted.layout)
    linear = fit(AutoencoderCodec(depth=0, start="random", cohort=0, **same), means, means, whole)
    principal = fit(LinearCodec(cohort=0, **same), means, means, whole)
    rows = {"on its own bank": {"linear autoencoder, random start": linear, "PCA": principal}}
    training_errors = {name: reconstruction_error(codec, fitted) for name, codec in rows["on its own bank"].items()}

    training = CodecTraining(steps=arguments.steps)
    codecs = {
        "autoencoder (tanh, skip)": fit(AutoencoderCodec(width=32, **same), fitted, stop, training),
        "autoencoder (tanh, no skip)": fit(
            AutoencoderCodec(width=256, skip=False, start="random", **same), fitted, stop, CodecTraining(steps=3 * arguments.steps, lr=3e-3)
        ),
        "autoencoder (linear, PCA start)": fit(AutoencoderCodec(depth=0, **same), fitted, stop, training),
        "PCA": fit(LinearCodec(**same), fitted, stop, training),
        "random projection": fit(LinearCodec(basis="random", **same), fitted, stop, training),
    }
    held_out = {name: reconstruction_error(codec, report) for name, codec in codecs.items()}
    many = record(data, network, algorithm, 10, 100, seed=1)
    by_cohort = {name: errors_by_cohort(codec, many) for name, codec in codecs.items()}
    show(training_errors, held_out, by_cohort)
    folder = Path("logs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    result = {"dataset": arguments.dataset, "own_bank": training_errors, "held_out": held_out, "by_cohort": by_cohort}
    (folder / "pretraining.json").write_text(json.dumps(result, indent=2) + "\n")


def show(training: dict[str, float], held_out: dict[str, float], by_cohort: dict[str, dict[int, float]]) -> None:
    """Print the three tables."""
    console = Console(width=150)
    table = Table("codec", "own bank", "held-out rounds", *(str(size) for size in next(iter(by_cohort.values()))), title="Relative error")
    for name, error in training.items():
        table.add_row(f"{name} (fitted to whole cohorts)", f"{error:.4f}")
    for name, error in held_out.items():
        table.add_row(name, "", f"{error:.3f}", *(f"{value:.3f}" for value in by_cohort[name].values()))
    console.print(table)
    console.print("The numbered columns are cohort sizes, on newly recorded rounds.")


if __name__ == "__main__":
    main()
