"""Rate-distortion on real updates: the error of the decoded mean of a cohort at equal bytes, codec beside codec.

    python tests/benchmarks/rate_distortion.py [--table clear] [--clients 10] [--ratios 64 128 256 512 1024]

MNIST over 100 clients, 10 a round, LeNet-5 (configs/mnist.yaml), trained without a codec. At round 60 every codec is fitted to 20 rounds
recorded on proxy data; then it carries the updates that clients really made in rounds 60 to 96. The error is the energy of what the decoded
mean misses, relative to the mean's, averaged over these rounds. Prints a table and writes it to logs/benchmarks/rate_distortion.json.

Tables: `clear`, the sums of plain codes. `secure`: sums of `--clients` masked codes, whose bytes are those of masked messages (with a
header of 16 bytes, as in the clear); with more than 10, that many clients train beside the round's own in every fourth of the rounds.
`encoders`: what codings of the factors weigh. `recordings`: what more recorded rounds on proxy data bring, in one trajectory or in several.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlight.aggregation.secure import SumFormat
from fedlight.clients import FedAvg, LocalModel, record_bank
from fedlight.codecs import ChainCodec, EntropyCodec, TransformCodec, TwoSidedCodec, WindowCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, ServerContext, State
from fedlight.core.entropy import EntropyFormat
from fedlight.core.export import encoder_file
from fedlight.core.random import derive_seed, torch_generator
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER, Message
from fedlight.data import Affine, Dirichlet, FederatedDataModule, Torchvision, Uniform
from fedlight.modules import LeNet5

FITTED, ROUNDS = 60, 97

RECORDINGS = ((10, 1), (20, 1), (40, 1), (80, 1), (40, 4), (80, 4), (160, 8))
"""Recorded rounds on proxy data, and the trajectories that share them."""


def record(clients: int = 10, recordings: tuple[tuple[int, int], ...] = RECORDINGS[1:2]) -> tuple[list[UpdateBank], Tensor]:
    """Return a proxy bank of round ``FITTED`` for each recording, and the real updates ``[rounds, clients, dim]`` from then on."""

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
            banks = [
                record_bank(proxies, *trained, rounds, 10, samples, 0.5, seed, first_round=number, trajectories=trajectories)
                for rounds, trajectories in recordings
            ]
        updates, cohort = [], data.cohort(number).tolist()
        more = [client for client in range(data.num_population) if client not in cohort][: clients - len(cohort)]
        measured = number >= FITTED and (not more or number % 4 == 0)
        for client in cohort + more * measured:
            model.load(weights, model.buffers)
            updates.append(algorithm.run(model, *data.client_data(client), number, torch_generator(0, number, client, "train")).update)
        if measured:
            made.append(torch.stack(updates))
        weights = weights - torch.stack(updates[: len(cohort)]).mean(0)
    return banks, torch.stack(made)


def entropy_coded(ratio: float, bits: float = 6, share: float = 0.22, coding: Literal["fixed", "entropy"] = "fixed") -> Codec:
    """Return a two-sided basis with some 20 coefficients for each float of a message: as many as the encoder's budget allows."""
    each = min(20.0, ratio / 4.5)
    return ChainCodec([TwoSidedCodec(ratio / each, factor_bits=bits, encoder_share=share, factor_coding=coding), EntropyCodec(each)])


def windows(ratio: float, clients: int) -> Codec:
    """Return a two-sided basis with some 6 coefficients for each float of a masked message."""
    return ChainCodec([TwoSidedCodec(ratio / 6, factor_bits=6, encoder_share=0.22), WindowCodec(6, clients)])


def codecs(table: str, ratio: float, clients: int) -> dict[str, Codec]:
    """Return what a table compares at a ratio, by name."""
    if table == "secure":
        return {"transform": TransformCodec(ratio, cohort=clients, secure_cohort=clients), "windows": windows(ratio, clients)}
    if table == "encoders":
        entropy = {f"{bits} bits, {share:.0%}": entropy_coded(ratio, bits, share, "entropy") for bits, share in ENCODERS}
        return {"6 bits, fixed": entropy_coded(ratio), **entropy}
    if table == "recordings":
        return {"entropy": entropy_coded(ratio, 2.5, SHARES.get(ratio, 0.22), "entropy")}
    return {"transform": TransformCodec(ratio), "entropy": entropy_coded(ratio)}


SHARES = {128: 0.12, 256: 0.09, 512: 0.07, 1024: 0.05}
"""Encoders of configs/compare_mnist_entropy.yaml, by ratio."""

ENCODERS = ((2.5, 0.22), (2.5, 0.1), (2.5, 0.07))
"""Mean bits of entropy-coded factors, and the share of the model's bytes that they would have if all had these bits."""


def measure_masked(codec: Codec, rounds: Tensor) -> dict[str, float]:
    """Return the error of rounds ``[rounds, clients, dim]``, the bytes of a masked message, and what shares of sums overflow."""
    state: State = {}
    format, errors, wrapped, lost = SumFormat.of(codec.encoder.format, rounds.shape[1]), [], 0, 0.0
    for number, updates in enumerate(rounds):
        context = Context(round=number, broadcast=codec.decoder.broadcast(state))
        codes = codec.encoder.encode(updates, context, Private(torch_generator("masked", number)))
        words = np.stack([format.words(code.numpy(), 1) for code in codes]).sum(0) % format.modulus
        total = format.read_sum(words, len(updates))
        known = ServerContext.of(context, len(updates), 0, total.lost)
        decoded = codec.decoder.decode(torch.from_numpy(total.code).float() / len(updates), known, state)
        mean = updates.mean(0)
        errors.append(float((decoded - mean).square().sum() / mean.square().sum()))
        wrapped, lost = wrapped + total.wrapped, lost + total.lost
    bytes = HEADER.size + format.payload_bytes
    return {
        "error": fmean(errors),
        "bytes": bytes,
        "ratio": 4 * codec.encoder.dim / bytes,
        "coefficients": codec.encoder.code_dim,
        "encoder_bytes": len(encoder_file(codec)),
        "wrapped": wrapped / len(rounds) / format.code_length,
        "lost": lost / len(rounds),
    }


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
    parser.add_argument("--table", choices=["clear", "secure", "encoders", "recordings"], default="clear")
    parser.add_argument("--clients", type=int, default=10, help="clients of a secure sum (default: 10)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--out", type=Path, default=Path("logs/benchmarks/rate_distortion.json"))
    given = parser.parse_args()
    recordings = RECORDINGS if given.table == "recordings" else RECORDINGS[1:2]
    banks, rounds = record(given.clients, recordings)
    rounds = rounds[::5] if given.table == "encoders" else rounds
    rows: list[dict[str, Any]] = []
    last = "overflows put right, lost" if given.table == "secure" else "ideal"
    table = Table("codec", "asked", "ratio", "bytes", "coefficients", "encoder kB", "error", last)
    for asked, (bank, recording) in product(given.ratios, zip(banks, recordings, strict=True)):
        for name, codec in codecs(given.table, asked, given.clients).items():
            codec.fit(bank, lambda *_: {})
            name += f", {recording[0]} rounds in {recording[1]}" if given.table == "recordings" else ""
            row: dict[str, Any] = {"codec": name, "asked": asked}
            row |= measure_masked(codec, rounds) if given.table == "secure" else measure(codec, rounds)
            rows.append(row)
            ideal = f"{row['wrapped']:.1e}, {row['lost']:.1e}" if given.table == "secure" else f"{row['ideal_bytes']:.0f}"
            size = f"{row['encoder_bytes'] / 1e3:.1f}"
            cells = [f"{row['ratio']:.1f}x", f"{row['bytes']:.0f}", f"{row['coefficients']:,}", size, f"{row['error']:.4f}", ideal]
            table.add_row(name, f"{asked:g}x", *cells)
    Console(width=110).print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
