"""Scaling: rounds per second against clients a round, processes and model size, and the bytes that processes all-reduce, with and without
a codec; then a model fitted to these figures for machines that were not measured.

python tests/benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from run import machine
from scaling_model import extrapolate
from throughput import quiet
from torch import Tensor, distributed

from fedlight.callbacks import CodecPretraining
from fedlight.clients import FedAvg
from fedlight.codecs import IdentityCodec, TransformCodec
from fedlight.core.codec import Codec
from fedlight.core.pretraining import ProxyFederation
from fedlight.data import IID, DataSource, FederatedDataModule, Uniform
from fedlight.data.arrays import Arrays, build_arrays
from fedlight.modules import MLP, FederatedModule
from fedlight.modules.trainer import FederatedTrainer

CLIENTS, SAMPLES, BATCH, FEATURES, PROXY = 10_000, 20, 10, 64, 500
WIDTHS = (32, 200, 1200)  # of two hidden layers: 3.5 k, 55 k and 1.5 M parameters
CODECS: dict[str, Callable[[], Codec]] = {"identity": IdentityCodec, "transform 64x": lambda: TransformCodec(64, cohort=10)}
MOST = 2e9  # clients times parameters of a round beyond which it is left out
COLUMNS = ("parameters", "codec", "clients", "processes", "rounds/s", "runs (s)", "bytes all-reduced", "message, bytes")
METHOD = (
    f"MLP of two equal hidden layers, {CLIENTS:,} clients of {SAMPLES} random samples, batch {BATCH}, one local epoch, SGD; one thread a "
    "process; no logging, validation, checkpoints or comparison with the true aggregate. Seconds of a round are medians after a warm-up "
    "round; the codec's pretraining is outside of them.",
    "Bytes all-reduced: length of all tensors that one process hands to `torch.distributed.all_reduce` in a round, counted there, mean.",
    "1.5 M parameters: cohorts of more than 1,000 are left out.",
)


class Blank(DataSource):
    """Random features: the same work as real ones."""

    def load(self, root: Path) -> Arrays:
        """Return them; ``root`` is not used."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((CLIENTS * SAMPLES + PROXY, FEATURES), dtype=np.float32)
        y = np.arange(len(x)) % 10
        return build_arrays(x, y, x[:100], y[:100], 10, source=self.name)


class Clock(Callback):
    """Takes the seconds of every round, and the bytes that this process all-reduces in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.reduced: list[int] = []
        self._all_reduce, self._bytes = distributed.all_reduce, 0
        distributed.all_reduce = self._counted

    def _counted(self, tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        self._bytes += tensor.numel() * tensor.element_size()
        return self._all_reduce(tensor, *arguments, **keywords)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a round."""
        self._bytes, self._begun = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it."""
        self.seconds.append(time.perf_counter() - self._begun)
        self.reduced.append(self._bytes)


def run(width: int, codec: str, cohort: int, processes: int, rounds: int) -> dict[str, Any] | None:
    """Return the row of one run; None in the other processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = FederatedDataModule(Blank(), IID(), num_clients=CLIENTS, sampler=Uniform(cohort), proxy_samples=PROXY)
    algorithm = FedAvg(lr=0.01, batch_size=BATCH, epochs=1)
    module = FederatedModule(MLP(FEATURES, [width, width], 10), CODECS[codec](), algorithm=algorithm, sim_every=0)
    clock, pretraining = Clock(), CodecPretraining(ProxyFederation(rounds=10, clients=4))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"limit_val_batches": 0, "max_steps": rounds + 1, "max_epochs": -1}
    with TemporaryDirectory() as folder, quiet():
        where = {"accelerator": "cpu", "devices": processes, "default_root_dir": folder}
        strategy = {"strategy": "ddp"} if processes > 1 else {}
        FederatedTrainer(callbacks=[clock, pretraining], **off, **limits, **where, **strategy).fit(module, datamodule=data)
    if not module.trainer.is_global_zero:
        return None
    return {
        "parameters": module.layout.dim,
        "codec": codec,
        "clients": cohort,
        "processes": processes,
        "seconds": statistics.median(clock.seconds[1:]),
        "runs": clock.seconds[1:],
        "bytes_all_reduced": round(statistics.mean(clock.reduced[1:])),  # sums of integers travel as narrow as they fit, round by round
        "message_bytes": module.server_state.traffic.mean_message,
    }


def table(columns: tuple[str, ...], lines: list[list[Any]]) -> list[str]:
    """Return a markdown table."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in [columns, ["---"] * len(columns), *lines]] + [""]


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Write scaling.json and scaling.md, and return the text of the latter."""
    links = {"a node of 16 GPUs": (16, arguments.node_link), "8 nodes of 16 GPUs": (128, arguments.network_link)}
    model, notes = extrapolate(rows, links, arguments.worker_speed) if any(row["processes"] > 1 for row in rows) else ([], [])
    kind = ("parameters", "codec", "clients", "processes")
    reduced = [(f"{row['bytes_all_reduced']:,}", f"{row['message_bytes']:,.0f}") for row in rows]
    runs = [" ".join(f"{seconds:.3g}" for seconds in row["runs"][:5]) for row in rows]
    measured = [[*(row[key] for key in kind), f"{1 / row['seconds']:.3g}", runs[k], *reduced[k]] for k, row in enumerate(rows)]
    kind = ("machine", "parameters", "codec", "clients")
    guesses = [[*(row[key] for key in kind), f"{1 / row['seconds']:.3g}", f"{row['share_of_all_reduce']:.1%}"] for row in model]
    text = ["# Scaling", "", ", ".join(f"{key}: {value}" for key, value in machine().items()), "", *table(COLUMNS, measured)]
    text += [f"- {line}" for line in METHOD]
    heads = ("machine", "parameters", "codec", "clients", "rounds/s, MODEL", "of it all-reduce, MODEL")
    text += ["", "## Other machines: a model", "", *table(heads, guesses), *(f"- {line}" for line in notes)] if model else []
    arguments.output.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "measured": rows, "model": {"assumptions": notes, "rows": model}}
    (arguments.output / "scaling.json").write_text(json.dumps(document, indent=2) + "\n")
    (arguments.output / "scaling.md").write_text("\n".join(text) + "\n")
    return "\n".join(text)


def main() -> None:
    """Measure every combination in a process of its own, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="clients a round")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the network's hidden layers")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (default: 2 to 30, more of small cohorts)")
    parser.add_argument("--worker-speed", type=float, default=1.0, help="model: how many times as fast as a core here a GPU is")
    parser.add_argument("--node-link", type=float, default=100.0, help="model: GB/s between GPUs of a node")
    parser.add_argument("--network-link", type=float, default=12.5, help="model: GB/s between nodes")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmarks"), help="folder of scaling.json and scaling.md")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        if row := run(**arguments.one):
            print(json.dumps(row))
        return
    rows: list[dict[str, Any]] = []
    text = ""
    for width, codec, clients, processes in itertools.product(arguments.widths, CODECS, arguments.clients, arguments.processes):
        if clients * width * (width + FEATURES) > MOST:
            continue
        rounds = arguments.rounds or max(2, min(30, 3000 // clients))
        one = {"width": width, "codec": codec, "cohort": clients, "processes": processes, "rounds": rounds}
        command = [sys.executable, __file__, "--one", json.dumps(one)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"parameters"')))
        print(one, f"{1 / rows[-1]['seconds']:.3g} rounds/s", flush=True)
        text = report(rows, arguments)  # after every row: an hour's work is not lost to the last one
    print(text, f"\nWritten to {arguments.output}")


if __name__ == "__main__":
    main()
