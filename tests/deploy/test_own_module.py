"""A user's LightningModule on nodes gives the run of a simulation, bit for bit: hooks, optimizer, schedule and data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedlight.clients import Algorithm, ClientOptimizer
from fedlight.core.errors import RoundFailedError
from fedlight.data import Everyone, FederatedData, FederatedDataModule, LightningData
from fedlight.deploy import InProcess, Node, NodeConfig, Share
from fedlight.deploy.protocol import Letter
from fedlight.modules import FederatedModule
from tests.deploy.deployment import class_path
from tests.rounds.federation import CLASSES, FEATURES

NODES = ["north", "south", "west"]
ROUNDS = 3


class Samples(LightningDataModule):
    """120 samples for all, of which the partition gives each client some."""

    def setup(self, stage: str) -> None:
        drawn = torch.Generator().manual_seed(1)
        x = torch.randn(120, FEATURES, generator=drawn)
        self.train = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        self.classes = CLASSES

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=8, shuffle=True)


class Lit(LightningModule):
    """Needs its Trainer for its layers and its schedule, draws from torch's generator, and counts in a hook."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, self.trainer.datamodule.classes))
        self.begun = 0

    def on_fit_start(self) -> None:
        self.scale = 0.5

    def on_train_batch_start(self, batch: Any, number: int) -> None:
        self.begun += 1

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        x, y = batch
        self.log("loss_of_a_client", 0.0)
        noise = 0.01 * torch.randn_like(x)
        return self.scale * nn.functional.cross_entropy(self.layers(x + noise), y) / self.begun**0.1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["rate"], momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data() -> FederatedDataModule:
    return FederatedDataModule(source=LightningData(Samples()), num_clients=3, proxy_fraction=0.0, sampler=Everyone())


def share(client: int) -> Share:
    return Share(FederatedData(source=LightningData(Samples()), num_clients=3, proxy_fraction=0.0, sampler=Everyone()), client)


def run(root: Path, clients: InProcess | None, algorithm: Algorithm | None) -> Tensor:
    model = FederatedModule(Lit(), algorithm=algorithm, clients=clients)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=ROUNDS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(model, datamodule=data())
    return torch.cat([parameter.detach().flatten() for parameter in model.network.parameters()])


def nodes(root: Path, algorithm: dict[str, Any] | None, allow: tuple[str, ...] = ("tests.deploy",)) -> InProcess:
    def answer(client: int, letter: Letter) -> bytes:
        """Answer as a process that has seen nothing before."""
        return Node(NodeConfig(NODES[client], share(client), str(root / NODES[client]), allow=allow)).answer(letter)

    clients = InProcess(answer, NODES, reproducible=True)
    clients.configure({"network": class_path("tests.deploy.test_own_module.Lit", rate=0.1), "algorithm": algorithm}, None)
    return clients


@pytest.mark.parametrize("epochs", [None, 2], ids=["the default algorithm", "two epochs a round"])
def test_the_rounds_are_those_of_a_simulation(tmp_path: Path, epochs: int | None) -> None:
    own = {} if epochs is None else {"epochs": epochs, "batch_size": 8}
    algorithm = None if epochs is None else ClientOptimizer(**own)
    told = None if epochs is None else class_path("fedlight.clients.ClientOptimizer", **own)
    simulated = run(tmp_path, None, algorithm)
    assert torch.equal(run(tmp_path, nodes(tmp_path, told), algorithm), simulated)


def test_a_module_that_the_node_does_not_allow_is_not_imported(tmp_path: Path) -> None:
    with pytest.raises(RoundFailedError, match="does not allow"):
        run(tmp_path, nodes(tmp_path, None, allow=()), None)
