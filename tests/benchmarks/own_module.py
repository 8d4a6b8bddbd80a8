"""B1 and B2 as LightningModules of a user's own: seconds of a round beside the bare network's, in one process, in turn.

The same clients, samples and local SGD: the network with fedlight's data and FedAvg; a LightningModule of it with the same data; and
with a LightningDataModule of its own. Both modules step torch's own SGD. Run:

    python tests/benchmarks/own_module.py [--workloads b1 b2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from throughput import BATCH, CLIENTS, COHORT, LR, WORKLOADS, Workload, load_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fedlight
from fedlight.clients import ClientOptimizer, FedAvg
from fedlight.data import FederatedDataModule
from fedlight.modules import FederatedModule


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


class Clock(Callback):
    """Notes the seconds of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self.begun = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.seconds.append(time.perf_counter() - self.begun)


def modules(workload: Workload, data: FederatedDataModule) -> dict[str, FederatedModule]:
    """Return what is compared, by name."""
    network, own = FedAvg(lr=LR, epochs=1, batch_size=BATCH), ClientOptimizer(epochs=1, batch_size=BATCH)
    torch.manual_seed(0)
    return {
        "the network": fedlight.federate(workload.network(), data, algorithm=network, sim_every=0),
        "a LightningModule": fedlight.federate(Own(workload.network()), data, algorithm=own, sim_every=0),
        "with its own data": fedlight.federate(
            Own(workload.network()), Images(data), num_clients=CLIENTS, cohort_size=COHORT, algorithm=own, sim_every=0
        ),
    }


def seconds(module: FederatedModule, rounds: int) -> list[float]:
    """Return the seconds of every round but the first."""
    clock = Clock()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(**quiet, accelerator="cpu", max_steps=rounds + 1, max_epochs=-1, limit_val_batches=0, callbacks=[clock]).fit(module)
    return clock.seconds[1:]


def main() -> None:
    """Measure and print a line for each workload and each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    data = load_data()
    data.setup("fit")
    for name in options.workloads:
        workload = WORKLOADS[name]
        found: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for way, module in modules(workload, data).items():
                found.setdefault(way, []).extend(seconds(module, workload.block * 2))
        least = statistics.median(found["the network"])
        for way, values in found.items():
            middle = statistics.median(values)
            print(f"{workload.title}, {way}: {middle:.3f} s a round (least {min(values):.3f}), {middle / least:.2f}x", flush=True)


if __name__ == "__main__":
    main()
