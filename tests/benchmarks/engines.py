"""Client steps per second of the engines, in turn on one device: `python tests/benchmarks/engines.py --device auto`.

B1's linear model, and B2's CNN without its dropout, which the vectorised engine refuses; threads on a CPU alone. All engines train the
same cohorts on the same batches, from the global weights to every client's checked update; nothing is encoded. Their updates must agree
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from throughput import BATCH, COHORT, LR, STEPS, linear, load_data
from torch import nn
from torch.nn.functional import cross_entropy

from fedlight.aggregation.base import TRAIN, Held, Sealer
from fedlight.clients import Engine, FedAvg, LocalModel, Sequential, Threaded, Vectorized
from fedlight.codecs import IdentityCodec
from fedlight.core.codec import Context
from fedlight.core.layout import Layout
from fedlight.core.model import Model
from fedlight.core.process import usable_cores
from fedlight.data import FederatedDataModule
from fedlight.modules import BenchmarkCNN
from fedlight.rounds import ClientHost, Download, Request
from fedlight.rounds.held import HeldModels

TOLERANCE = 1e-4  # median relative distance of the engines' updates: cuDNN may choose other kernels for one client and for many
FARTHEST = 1e-2  # of any client's: where two numbers are nearly equal, rounding decides which one max pooling takes


def cnn() -> nn.Module:
    """Return B2's model without dropout."""
    network = BenchmarkCNN()
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return network


class Nothing(Sealer):
    """Sends nothing of a code but that there is one."""

    def seal(self, client: int, code: torch.Tensor, weight: int, payload: bytes, held: Held) -> bytes:
        """Return one byte."""
        return b"-"


WORKLOADS = {"b1": ("B1 linear(3072, 10)", linear), "b2": ("B2 BenchmarkCNN without dropout", cnn)}


class Contest:
    """The engines on one model, one set of clients and the same rounds."""

    def __init__(self, network: nn.Module, data: FederatedDataModule, device: torch.device, clients: int) -> None:
        self.model = LocalModel(network, lambda net, x, y: cross_entropy(net(x), y), device)
        self.data = data.to(device)
        self.device = device
        self.start = Model(self.model.weights.clone(), self.model.buffers.clone())
        self.codec = IdentityCodec()
        self.codec.bind(Layout.of(network))
        self.algorithm = FedAvg(lr=LR, batch_size=BATCH, epochs=1)
        self.engines: dict[str, Engine] = {"sequential": Sequential(), f"vectorized({clients})": Vectorized(clients)}
        if device.type == "cpu":
            self.engines[f"threaded({usable_cores()})"] = Threaded()

    def run(self, name: str, number: int) -> list[torch.Tensor]:
        """Return the updates of one round's clients."""
        host = ClientHost(self.model, self.algorithm, self.data.client_data, HeldModels(self.codec), Nothing(), engine=self.engines[name])
        context, download = Context(round=number), Download(number, model=self.start, result=self.start)
        requests = [Request(client, TRAIN, context, download) for client in self.data.cohort(number).tolist()]
        updates = [reply.simulation.update for reply in host.answers(requests) if reply.simulation is not None]
        return [update for update in updates if update is not None]

    def seconds(self, name: str, rounds: int) -> float:
        """Return the seconds of so many rounds, the device's queue emptied at both ends."""
        self.wait()
        begin = time.perf_counter()
        for number in range(rounds):
            self.run(name, number)
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def distances(self) -> list[float]:
        """Return the relative distances of the other engines' updates in a round from the sequential one's, in ascending order."""
        first, *others = (self.run(name, 0) for name in self.engines)
        assert all(len(updates) == COHORT for updates in (first, *others))
        return sorted(float((a - b).norm() / a.norm()) for updates in others for a, b in zip(first, updates, strict=True))


class Utilization:
    """Mean utilization of the GPU in percent while a block runs, as nvidia-smi samples it; None without it."""

    def __enter__(self) -> Utilization:
        self.mean: float | None = None
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0", "-lms", "100"]
        found = torch.cuda.is_available() and shutil.which("nvidia-smi")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if found else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            samples = [float(line) for line in self.process.communicate()[0].split() if line.isdigit()]
            self.mean = statistics.mean(samples) if samples else None


def measure(name: str, data: FederatedDataModule, device: torch.device, clients: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each engine: medians of alternating runs after a warm-up."""
    title, network = WORKLOADS[name]
    torch.manual_seed(0)
    contest = Contest(network(), data, device, clients)
    distances = contest.distances()
    median, farthest = statistics.median(distances), distances[-1]
    equal = median < TOLERANCE and farthest < FARTHEST
    assert equal, f"expected equal updates but they differ by {median:.0e} of their length, one by {farthest:.0e}"
    rates: dict[str, list[float]] = {engine: [] for engine in contest.engines}
    busy: dict[str, list[float]] = {engine: [] for engine in contest.engines}
    for _ in range(repeats):
        for engine in contest.engines:
            with Utilization() as utilization:
                rates[engine].append(rounds * STEPS / contest.seconds(engine, rounds))
            busy[engine] += [] if utilization.mean is None else [utilization.mean]
    first = rates["sequential"]
    return [
        {
            "benchmark": title,
            "system": f"fedlight, {engine}, {device.type}",
            "client_steps_per_second": statistics.median(runs),
            "ratio_to_sequential": statistics.median(own / other for own, other in zip(runs, first, strict=True)),
            "gpu_utilization": statistics.mean(busy[engine]) if busy[engine] else None,
            "update_distance": median,
            "update_distance_max": farthest,
            "peak_rss_mb": None,  # all run in one process
            "runs": runs,
        }
        for engine, runs in rates.items()
    ]


def main() -> None:
    """Run what was asked for, show it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU where there is one (default)")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="comma-separated, of b1 and b2 (default: both)")
    parser.add_argument("--clients", type=int, default=COHORT, help=f"clients trained at once (default: the cohort, {COHORT})")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in a run (default: 5)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine, in turn, of which the median is taken (default: 3)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmarks"), help="folder of engines.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # equal numerics: the engines' kernels may differ in when they round to TF32
    device, data, rows = torch.device(arguments.device), load_data(), []
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{on}; torch {torch.__version__}; {data.source.name}")
    for name in arguments.only.split(","):
        for row in measure(name, data, device, arguments.clients, arguments.rounds, arguments.repeats):
            rows.append(row | {"device": on})
            rate, ratio, busy = row["client_steps_per_second"], row["ratio_to_sequential"], row["gpu_utilization"]
            shown = "" if busy is None else f"   GPU {busy:.0f} %"
            print(f"{row['benchmark']:32}  {row['system']:32}  {rate:10,.0f} client steps/s   {ratio:6.2f}x{shown}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "engines.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
