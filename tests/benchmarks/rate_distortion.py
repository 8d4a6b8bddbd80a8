"""Rate-distortion on real updates: the error of the decoded mean of a cohort at equal bytes, codec beside codec.

    python tests/benchmarks/rate_distortion.py [--ratios 64 128 256 512 1024]

MNIST over 100 clients, 10 a round, LeNet-5 (configs/mnist.yaml), trained without a codec. At round 60 every codec is fitted to 20 rounds
recorded on proxy data; then it carries the updates that clients really made in rounds 60 to 96. The error is the energy of what the decoded
mean misses, relative to the mean's, averaged over these rounds. Prints a table and writes it to logs/benchmarks/rate_distortion.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlight.clients import FedAvg, LocalModel, record_bank
from fedlight.codecs import ChainCodec, EntropyCodec, TransformCodec, TwoSidedCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, State
from fedlight.core.entropy import EntropyFormat
from fedlight.core.export import encoder_file
from fedlight.core.random import derive_seed, torch_generator
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER, Message
from fedlight.data import Affine, Dirichlet, FederatedDataModule, Torchvision, Uniform
from fedlight.modules import LeNet5

FITTED, ROUNDS, PROXY_ROUNDS = 60, 97, 20


def record() -> tuple[UpdateBank, Tensor]:
    """Return the proxy bank of round ``FITTED`` and the real updates ``[rounds, clients, dim]`` from then on."""

    def objective(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(network(x), y)

    torch.manual_seed(0)
    data = FederatedDataModule(
        Torchvision("MNIST"), Dirichlet(0.5), 100, Uniform(10), proxy_samples=2000, proxy_augmentation=Affine(10, 0.1, 1)
    )
    data.prepare_data()
    data.setup()
    assert data.proxy is not None
    network, algorithm = LeNet5(), FedAvg(lr=0.05, batch_size=32, steps=10)
    model, proxies = LocalModel(network, objective), LocalModel(network, objective, augment=data.proxy_augmentation)
    weights, made = model.weights.clone(), []
    for number in range(ROUNDS):
        if number == FITTED:
            samples, seed = len(data.y) // data.num_population, derive_seed(0, "proxy")
            trained = (weights.clone(), model.buffers.clone(), algorithm, data.proxy, data.num_classes)
            bank = record_bank(proxies, *trained, PROXY_ROUNDS, 10, samples, 0.5, seed, first_round=number)
        updates = []
        for client in data.cohort(number).tolist():
            model.load(weights, model.buffers)
            updates.append(algorithm.run(model, *data.client_data(client), number, torch_generator(0, number, client, "train")).update)
        if number >= FITTED:
            made.append(torch.stack(updates))
        weights = weights - torch.stack(updates).mean(0)
    return bank, torch.stack(made)


def entropy_coded(ratio: float) -> Codec:
    """Return a two-sided basis with some 20 coefficients for each float of a message: as many as the encoder's budget allows."""
    share = min(20.0, ratio / 4.5)
    return ChainCodec([TwoSidedCodec(ratio / share, factor_bits=6, encoder_share=0.22), EntropyCodec(share)])


CODECS = {"transform": TransformCodec, "entropy": entropy_coded}


def measure(codec: Codec, rounds: Tensor) -> dict[str, float]:
    """Return the error of rounds ``[rounds, clients, dim]``, the mean bytes of a message, and those that its models say it tells."""
    state: State = {}
    errors, lengths, ideal = [], [], []
    format = codec.encoder.format

    def count(step: int, client: int, message: Message) -> None:
        lengths.append(len(message))
        if isinstance(format, EntropyFormat):
            ideal.append(HEADER.size + format.ideal_bytes(format.unpack(memoryview(message)[HEADER.size :])))

    for number, updates in enumerate(rounds, FITTED):
        mean = updates.mean(0)
        decoded = simulate_round(codec, updates, context=Context(round=number), server_state=state, on_message=count)
        errors.append(float((decoded - mean).square().sum() / mean.square().sum()))
    return {
        "error": fmean(errors),
        "bytes": fmean(lengths),
        "ideal_bytes": fmean(ideal or lengths),
        "ratio": 4 * codec.encoder.dim / fmean(lengths),
        "coefficients": codec.encoder.code_dim,
        "encoder_bytes": len(encoder_file(codec)),
    }


def main() -> None:
    """Record, fit, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--out", type=Path, default=Path("logs/benchmarks/rate_distortion.json"))
    given = parser.parse_args()
    bank, rounds = record()
    rows: list[dict[str, Any]] = []
    table = Table("codec", "asked", "ratio", "bytes", "ideal", "coefficients", "encoder kB", "error")
    for asked in given.ratios:
        for name, make in CODECS.items():
            codec = make(asked)
            codec.fit(bank, lambda *_: {})
            row = {"codec": name, "asked": asked, **measure(codec, rounds)}
            rows.append(row)
            table.add_row(
                name,
                f"{asked:g}x",
                f"{row['ratio']:.0f}x",
                f"{row['bytes']:.0f}",
                f"{row['ideal_bytes']:.0f}",
                f"{row['coefficients']:,}",
                f"{row['encoder_bytes'] / 1e3:.0f}",
                f"{row['error']:.4f}",
            )
    Console(width=100).print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
