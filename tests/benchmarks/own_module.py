"""B1 and B2 as LightningModules of a user's own: a client's seconds beside the bare network's, in one process, client by client in turn.

The same clients, samples and local SGD: the network with fedlight's data and FedAvg; a LightningModule of it with the same data; and
with a LightningDataModule of its own. Both modules step torch's own SGD. Seconds are the process's own, and those of the clock. Run:

    python tests/benchmarks/own_module.py [--workloads b1 b2] [--clients 40]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from throughput import BATCH, CLIENTS, LR, WORKLOADS, Workload, load_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fedlight
from fedlight.aggregation.base import TRAIN
from fedlight.clients import ClientOptimizer, FedAvg, Sequential
from fedlight.core.codec import Context
from fedlight.data import FederatedDataModule, Uniform
from fedlight.modules import FederatedModule
from fedlight.rounds import Download, Request


class Own(LightningModule):
    """A network in a training step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=LR)


class Images(LightningDataModule):
    """The same samples."""

    def __init__(self, data: FederatedDataModule) -> None:
        super().__init__()
        self.set = TensorDataset(data.x, data.y)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that shuffles."""
        return DataLoader(self.set, batch_size=BATCH, shuffle=True)


def modules(workload: Workload, data: FederatedDataModule) -> dict[str, FederatedModule]:
    """Return what is compared, by name."""
    network, own = FedAvg(lr=LR, epochs=1, batch_size=BATCH), ClientOptimizer(epochs=1, batch_size=BATCH)
    settings: Any = {"engine": Sequential(), "sim_every": 0}
    torch.manual_seed(0)
    return {
        "the network": fedlight.federate(workload.network(), data, algorithm=network, **settings),
        "a LightningModule": fedlight.federate(Own(workload.network()), data, algorithm=own, **settings),
        "with its own data": fedlight.federate(
            Own(workload.network()), Images(data), num_clients=CLIENTS, cohort_size=1, algorithm=own, **settings
        ),
    }


def prepared(module: FederatedModule) -> Callable[[int], None]:
    """Run one round of one client, and return what trains one client more."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(**quiet, accelerator="cpu", max_steps=1, max_epochs=-1, limit_val_batches=0).fit(module)
    model, host = module.server.model.read(), module._connection.host  # type: ignore[attr-defined]

    def train(client: int) -> None:
        for _ in host.answers([Request(client, TRAIN, Context(round=1), Download(1, model=model, result=model))]):
            pass

    return train


def main() -> None:
    """Measure and print a line for each workload and each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--clients", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    data = load_data()
    data.setup("fit")
    data.sampler = Uniform(1)
    for name in options.workloads:
        workload = WORKLOADS[name]
        ways = {way: prepared(module) for way, module in modules(workload, data).items()}
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for client in range(options.clients):
            for way, train in ways.items():
                begun = time.process_time(), time.perf_counter()
                train(client)
                found[way].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
        least = [statistics.median(values) for values in zip(*found["the network"], strict=True)]
        for way, pairs in found.items():
            own, clock = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratios = f"{own / least[0]:.2f}x, by the clock {clock / least[1]:.2f}x"
            print(f"{workload.title}, {way}: {1000 * own:.1f} ms a client, {ratios}", flush=True)


if __name__ == "__main__":
    main()
