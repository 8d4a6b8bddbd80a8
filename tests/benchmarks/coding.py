"""B5: what a learned codec costs beside the client training it is used with: fit, encoding and packing, unpacking, summing, decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from throughput import CIFAR_FILE, RandomImages
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from fedlight.clients import FedAvg, LocalModel, record_bank
from fedlight.codecs import ChainCodec, EntropyCodec, QuantizeCodec, TransformCodec, TwoSidedCodec
from fedlight.codecs.chain import ChainEncoder
from fedlight.codecs.two_sided import TwoSidedEncoder
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, ServerContext
from fedlight.core.export import encoder_file
from fedlight.core.random import torch_generator
from fedlight.core.running_sum import RunningSum
from fedlight.data import IID, ArrayFile, DataSource, FederatedDataModule, Torchvision
from fedlight.modules import BenchmarkCNN, LeNet5

ROUNDS, CLIENTS = 20, 2
"""What is recorded for the fit."""

CODECS: dict[str, Callable[[], Codec]] = {
    "TransformCodec(128)": lambda: TransformCodec(128),
    "TwoSidedCodec(6.4), EntropyCodec(20)": lambda: ChainCodec([TwoSidedCodec(6.4, factor_bits=6, encoder_share=0.22), EntropyCodec(20)]),
    "the same, entropy-coded factors": lambda: ChainCodec(
        [TwoSidedCodec(6.4, cohort=10, factor_bits=2.5, factor_coding="entropy", encoder_share=0.03), EntropyCodec(20)]
    ),
    "TwoSidedCodec(16), QuantizeCodec(4)": lambda: ChainCodec([TwoSidedCodec(16), QuantizeCodec(4)]),
}
"""All at 128 times or more, beside 32-bit updates."""


def group_norm(channels: int) -> nn.Module:
    """Return the normalisation that clients with skewed labels need, in place of BatchNorm."""
    return nn.GroupNorm(8, channels)


@dataclass(frozen=True)
class Setting:
    """A model and the round it is used in: ``cohort`` clients of ``samples`` samples."""

    title: str
    network: Callable[[], nn.Module]
    dataset: str
    algorithm: FedAvg
    cohort: int
    samples: int
    round: str


SETTINGS = (
    Setting("B5 LeNet5", LeNet5, "mnist", FedAvg(lr=0.05, batch_size=32, steps=10), 10, 580, "10 clients x 10 steps of 32, MNIST"),
    Setting(
        "B5 BenchmarkCNN", BenchmarkCNN, "cifar", FedAvg(lr=0.1, batch_size=10, epochs=1), 50, 50, "50 clients x 5 steps of 10, CIFAR-10"
    ),
    Setting(
        "B5 ResNet-18",
        lambda: resnet18(num_classes=10, norm_layer=group_norm),
        "cifar",
        FedAvg(lr=0.05, batch_size=32, steps=5),
        10,
        160,
        "10 clients x 5 steps of 32 (a short round: longer ones make the share smaller), CIFAR-10",
    ),
)


def load_data(dataset: str) -> FederatedDataModule:
    """Return the data with 2,000 proxy samples: from the data root, or else random images of their shape."""

    def make(source: DataSource) -> FederatedDataModule:
        return FederatedDataModule(source, IID(), num_clients=30, proxy_samples=2000)

    if dataset == "mnist":
        data = make(Torchvision("MNIST", download=False))
        data = data if (data.root / "MNIST" / "raw").exists() else make(RandomImages((1, 28, 28)))
    else:
        data = make(ArrayFile(CIFAR_FILE))
        data = data if (data.root / CIFAR_FILE).exists() else make(RandomImages())
    data.setup()
    return data


class Bench:
    """One setting: its model, data, recorded updates, and the codecs fitted to them."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.data = load_data(setting.dataset)
        self.model = LocalModel(setting.network(), lambda network, x, y: cross_entropy(network(x), y))
        self.start = self.model.weights.clone()
        self.bank = self.record()
        self.codecs = {name: make() for name, make in CODECS.items()}
        self.copy = torch.empty_like(self.start)

    def record(self) -> UpdateBank:
        """Return the bank that the codecs are fitted to."""
        assert self.data.proxy is not None
        trained = (self.setting.algorithm, self.data.proxy, self.data.num_classes)
        return record_bank(self.model, self.start, self.model.buffers.clone(), *trained, ROUNDS, CLIENTS, self.setting.samples, 0.5, 0)

    def fit(self) -> dict[str, float]:
        """Return the seconds that each codec takes to fit, one after another."""
        return {name: seconds(lambda codec=codec: codec.fit(self.bank, lambda *_: {}))[0] for name, codec in self.codecs.items()}

    def round(self) -> dict[str, Any]:
        """Return seconds of a round: client by client of training, of copying the update, and of each codec's part."""
        spent: dict[str, Any] = {"train": [], "copy": []} | {name: {"encode": [], "read": []} for name in self.codecs}
        publics = {name: Context(broadcast=codec.decoder.broadcast({})) for name, codec in self.codecs.items()}
        sums = {name: RunningSum() for name in self.codecs}
        for client in range(self.setting.cohort):
            taken, update = seconds(lambda client=client: self.train(client))
            spent["train"].append(taken)
            spent["copy"].append(min(seconds(lambda update=update: self.copy.copy_(update))[0] for _ in range(3)))
            for name, codec in list(self.codecs.items())[:: 1 if client % 2 else -1]:  # the first finds a colder cache
                private = Private(torch_generator("benchmark", client))

                def encode(codec: Codec = codec, name: str = name, update: Tensor = update, private: Private = private) -> bytes:
                    return codec.encoder.encode_message(update, publics[name], private)

                taken, message = seconds(encode)
                spent[name]["encode"].append(taken)

                def read(codec: Codec = codec, name: str = name, message: bytes = message) -> None:
                    sums[name].add(codec.decoder.read_message(message, publics[name]))

                spent[name]["read"].append(seconds(read)[0])
                spent[name]["message"] = len(message)
        for name, codec in self.codecs.items():
            context = ServerContext.of(publics[name], self.setting.cohort)
            mean = seconds(sums[name].mean)
            decoded = seconds(lambda codec=codec, mean=mean[1], context=context: codec.decoder.decode(mean, context, {}))
            spent[name]["decode"] = mean[0] + decoded[0]
        return spent

    def train(self, client: int) -> Tensor:
        """Return the update that a client sends."""
        rows = torch.from_numpy(self.data.train_partition[client % self.data.num_population])[: self.setting.samples]
        self.model.load(self.start, self.model.buffers)
        return self.setting.algorithm.run(self.model, self.data.x[rows], self.data.y[rows], 0, torch_generator("benchmark", client)).update


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def measure(repeats: int) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each setting and codec, and a line on rounds and data."""
    rows, notes = [], []
    for setting in SETTINGS:
        bench = Bench(setting)
        fits, rounds = [], []
        for repeat in range(repeats + 1):
            fits.append(bench.fit())
            rounds.append(bench.round())
            if not repeat:  # the first warms up
                fits, rounds = [], []
        rows += [row(bench, name, [fit[name] for fit in fits], rounds) for name in bench.codecs]
        notes.append(f"{setting.title}: {setting.round} ({bench.data.source.name}), fitted to {ROUNDS} rounds x {CLIENTS} clients")
    return rows, "; ".join(notes)


def row(bench: Bench, name: str, fits: list[float], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one codec's row: medians of the repeats; ``runs`` holds the codec's share of each round's training time."""
    codec, cohort, size = bench.codecs[name], bench.setting.cohort, 4 * len(bench.start)
    encode = statistics.median(statistics.median(spent[name]["encode"]) for spent in rounds)
    copied = statistics.median(statistics.median(spent["copy"]) for spent in rounds)
    server = [sum(spent[name]["read"]) + spent[name]["decode"] for spent in rounds]
    shares = [(sum(spent[name]["encode"]) + each) / sum(spent["train"]) for spent, each in zip(rounds, server, strict=True)]
    assert isinstance(codec.encoder, ChainEncoder)
    basis = codec.encoder.stage(0)
    assert isinstance(basis, TwoSidedEncoder)
    factored = [grid for grid, item in zip(basis.grids, basis.matrices.items, strict=True) if not item.plain]
    return {
        "benchmark": bench.setting.title,
        "system": name,
        "client_steps_per_second": None,
        "rounds_per_second": None,
        "ratio_to_bare": None,
        "peak_rss_mb": None,
        "parameters": len(bench.start),
        "fit_seconds": statistics.median(fits),
        "train_seconds_per_client": statistics.median(sum(spent["train"]) / cohort for spent in rounds),
        "encode_seconds_per_client": encode,
        "server_seconds_per_round": statistics.median(server),
        "encode_gb_per_second": size / encode / 1e9,
        "copy_gb_per_second": size / copied / 1e9,
        "share_of_round": statistics.median(shares),
        "message_bytes": rounds[-1][name]["message"],
        "coefficients": codec.encoder.code_dim,
        "ranks_left": sorted(left for left, *_ in factored),
        "ranks_right": sorted(rank for _, *right in factored for rank in right),
        "encoder_bytes": len(encoder_file(codec)),
        "runs": shares,
    }


COLUMNS = (
    "benchmark",
    "parameters",
    "codec",
    "fit s",
    "train ms/client",
    "encode ms/client",
    "server ms/round",
    "encode GB/s",
    "copy GB/s",
    "of training",
    "ratio",
    "coefficients",
    "ranks",
    "encoder MB",
    "runs",
)

SHORT = ("benchmark", "codec", "fit s", "encode ms/client", "server ms/round", "of training", "ratio", "encoder MB")
"""What fits a terminal."""


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as text."""

    def span(ranks: list[int]) -> str:
        return f"{ranks[0]}-{ranks[-1]}"

    return [
        row["benchmark"],
        f"{row['parameters']:,}",
        row["system"],
        f"{row['fit_seconds']:.1f}",
        f"{1e3 * row['train_seconds_per_client']:.1f}",
        f"{1e3 * row['encode_seconds_per_client']:.2f}",
        f"{1e3 * row['server_seconds_per_round']:.1f}",
        f"{row['encode_gb_per_second']:.2f}",
        f"{row['copy_gb_per_second']:.1f}",
        f"{row['share_of_round']:.1%}",
        f"{4 * row['parameters'] / row['message_bytes']:,.0f}x",
        f"{row['coefficients']:,}",
        f"{span(row['ranks_left'])} / {span(row['ranks_right'])}",
        f"{row['encoder_bytes'] / 1e6:.2f}",
        " ".join(f"{share:.1%}" for share in row["runs"]),
    ]
