"""Modules and data modules that know nothing of fedlight are federated as they are."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fedlight
from fedlight.aggregation.base import TRAIN
from fedlight.callbacks import CodecRefresh
from fedlight.clients import ClientOptimizer, FedAvg, FedSGD
from fedlight.codecs import TwoSidedCodec
from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError, DataError
from fedlight.core.export import save_codec
from fedlight.core.pretraining import ProxyFederation
from fedlight.data import Everyone, FederatedDataModule, LightningData
from fedlight.modules import FederatedModule
from fedlight.rounds import Download, Request
from tests.federation import SHORT, federated_data, pretraining, run_folders, weights_of
from tests.own import Line, LitClassifier, LitLanguageModel, Points, Text


def fit(module: FederatedModule, rounds: int = 5, **settings) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    loops = {"max_epochs": -1, "val_check_interval": rounds, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    trainer = Trainer(**quiet | loops | {"accelerator": "cpu", "devices": 1, "max_steps": rounds} | settings)
    torch.manual_seed(0)
    trainer.fit(module)
    return trainer


def boring() -> BoringModel:
    torch.manual_seed(0)
    return BoringModel()


@pytest.mark.parametrize("data", [None, BoringDataModule()], ids=["its own loaders", "a data module"])
def test_boring_model_is_trained(data):
    own = boring()
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    before = own.loss(own(x)).item()
    fit(fedlight.federate(own, data, num_clients=4), rounds=10)
    assert own.loss(own(x)).item() < 0.6 * before


def test_a_test_after_a_fit_overrides_no_callback(caplog):
    trainer = fit(fedlight.federate(LitClassifier(), Points(), num_clients=6), rounds=1)
    lightnings = logging.getLogger("lightning.pytorch")
    lightnings.addHandler(caplog.handler)
    try:
        trainer.test(trainer.lightning_module, verbose=False)
    finally:
        lightnings.removeHandler(caplog.handler)
    assert "will override" not in caplog.text


def test_three_lines_train_a_classifier():
    torch.manual_seed(0)
    trainer = fit(fedlight.federate(LitClassifier(), Points(), num_clients=6), rounds=15)
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    assert "val_loss" in trainer.callback_metrics
    assert "train_loss" not in trainer.callback_metrics  # what a client logs stays there
    figures = trainer.test(trainer.lightning_module, verbose=False)
    assert figures[0]["test_accuracy"] > 0.9


def test_a_regression_with_any_network_and_loss():
    torch.manual_seed(0)
    module = fedlight.federate(nn.Linear(4, 1), Line(), num_clients=5, loss=nn.MSELoss(), algorithm=FedAvg(lr=0.1, steps=5))
    trainer = fit(module, rounds=20)
    assert trainer.callback_metrics["val/loss"] < 1e-2


def test_a_language_model_with_batches_that_are_dicts():
    torch.manual_seed(0)
    trainer = fit(fedlight.federate(LitLanguageModel(), Text(), num_clients=4), rounds=10)
    assert trainer.callback_metrics["val_perplexity"] < 4  # of 14 characters


def test_a_codec_is_pretrained_on_samples_kept_from_the_clients():
    torch.manual_seed(0)
    module = fedlight.federate(LitClassifier(norm=False), Points(), num_clients=6, proxy_samples=40, codec=TwoSidedCodec(ratio=4))
    trainer = fit(module, rounds=15, callbacks=[pretraining()])
    assert trainer.callback_metrics["val_accuracy"] > 0.85
    assert module.data.partition.sizes.sum() == 200
    assert module.server_state.traffic.mean_message < 4 * module.layout.dim / 3


def test_its_codec_is_refreshed_and_without_proxy_samples_that_is_refused_before_training(tmp_path):
    def refreshed(**settings) -> FederatedModule:
        module = fedlight.federate(LitClassifier(norm=False), Points(), num_clients=6, **settings)
        fit(module, rounds=3, callbacks=[pretraining(), CodecRefresh(2, ProxyFederation(rounds=6, clients=3, samples=10), SHORT)])
        return module

    trained = refreshed(proxy_samples=40, codec=TwoSidedCodec(ratio=4))
    assert trained.codec.version == 2
    save_codec(trained.codec, tmp_path)
    with pytest.raises(ConfigurationError, match="Expected proxy data to refresh the codec on.*`data.proxy_samples`"):
        refreshed(codec_path=str(tmp_path))


@pytest.mark.parametrize("ignored", [{"num_clients": 4}, {"cohort_size": 3}, {"sampler": Everyone()}, {"proxy_samples": 0}])
def test_what_federated_data_say_themselves_is_refused_beside_them(ignored):
    with pytest.raises(ConfigurationError, match=f"(?s){next(iter(ignored))}.*FederatedDataModule.*set them there"):
        fedlight.federate(LitClassifier(), federated_data(), **ignored)


def test_one_client_with_the_whole_set_trains_as_the_trainer_does():
    """A federation of one client whose local optimizer is the module's own is plain training: the same weights, step by step."""

    class InOrder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, 1)
            self.seen: list[int] = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    class Whole(Line):
        def train_dataloader(self):
            return DataLoader(self.train, batch_size=160)

    plain, own = InOrder(), InOrder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=7, limit_val_batches=0, **quiet).fit(plain, datamodule=Whole())
    module = fedlight.federate(own, Whole(), num_clients=1, algorithm=ClientOptimizer(steps=7, batch_size=160))
    fit(module, rounds=1)
    torch.testing.assert_close(weights_of(own), weights_of(plain), rtol=1e-4, atol=1e-5)
    assert list(module._connection.host.model.module.seen) == list(range(7))


def test_a_clients_result_does_not_depend_on_who_came_before():
    results = []
    for clients in ([0, 1, 2], [2, 0, 1]):
        torch.manual_seed(0)
        module = fedlight.federate(LitClassifier(), Points(), num_clients=3, sampler=Everyone())
        fit(module, rounds=1)
        model, host = module.server.model.read(), module._connection.host
        requests = [Request(client, TRAIN, Context(round=1), Download(1, model=model, result=model)) for client in clients]
        results.append({reply.client: reply.simulation.update.clone() for reply in host.answers(requests)})
    for client in range(3):
        assert torch.equal(results[0][client], results[1][client])


def test_a_step_that_returns_none_moves_nothing():
    class Silent(BoringModel):
        def training_step(self, batch, batch_idx):
            return None

    own = Silent()
    before = weights_of(own).clone()
    fit(fedlight.federate(own, num_clients=4), rounds=2)
    assert torch.equal(weights_of(own), before)


def test_the_users_module_on_fedlights_data():
    torch.manual_seed(0)
    module = fedlight.federate(LitClassifier(), federated_data(), seed=3)
    assert fit(module, rounds=8).callback_metrics["val_accuracy"] > 0.7  # of neighbouring classes; a guess has 0.33


def test_fedsgd_takes_samples_of_any_kind():
    """The update of FedSGD is the mean gradient, whatever the batches that it is added up from."""
    updates = []
    for size in (7, 1000):
        own = boring()
        fit(fedlight.federate(own, BoringDataModule(), num_clients=1, algorithm=FedSGD(batch_size=size)), rounds=1)
        updates.append(weights_of(own))
    torch.testing.assert_close(updates[0], updates[1])


class TwoOptimizers(BoringModel):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


class OwnBackward(BoringModel):
    def backward(self, loss):
        loss.backward()


class Stream(BoringDataModule):
    def train_dataloader(self):
        class Endless(IterableDataset):
            def __iter__(self):
                return iter([])

        return DataLoader(Endless())


@pytest.mark.parametrize(
    ("own", "data", "error", "message"),
    [
        (ManualOptimBoringModel, None, ConfigurationError, "automatic optimization.*return the loss"),
        (TwoOptimizers, None, ConfigurationError, "one optimizer for the clients but got SGD, SGD: .*set `algorithm`"),
        (OwnBackward, None, ConfigurationError, "overrides `backward`.*choose the local step"),
        (BoringModel, Stream, DataError, "random access.*`__getitem__`"),
        (lambda: nn.Linear(32, 2), None, ConfigurationError, "Expected `data` for a Linear"),
        (lambda: nn.Linear(32, 2), BoringDataModule, ConfigurationError, r"batches \(inputs, targets\).*LightningModule"),
        (lambda: LightningModule(), BoringDataModule, ConfigurationError, "`training_step` but LightningModule has none"),
    ],
)
def test_what_cannot_work_is_refused(own, data, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        fit(fedlight.federate(own(), data() if data else None, num_clients=4), num_sanity_val_steps=0)


def test_by_class_path_with_labels_from_the_data_module(tmp_path):
    from fedlight.cli import fit as command

    config = tmp_path / "own.yaml"
    config.write_text(
        """
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 4, enable_progress_bar: false}
data:
  source:
    class_path: LightningData
    init_args: {datamodule: {class_path: tests.own.Points}}
  partitioner: {class_path: Dirichlet, init_args: {alpha: 0.1}}
  num_clients: 6
  sampler: {class_path: Uniform, init_args: {cohort_size: 3}}
  proxy_samples: 0
model:
  network: {class_path: tests.own.LitClassifier}
"""
    )
    folder = command(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)])
    summary = (run_folders(tmp_path)[0] / "summary.json").read_text()
    assert folder and '"test_accuracy"' in summary


def test_partitions_by_label_see_the_labels():
    from fedlight.data import Shards

    data = FederatedDataModule(LightningData(Points()), Shards(1), num_clients=3, sampler=Everyone(), proxy_samples=0)
    data.setup("fit")
    purity = [torch.bincount(data.client_data(client)[1], minlength=3).max() / data.client_size(client) for client in range(3)]
    assert min(purity) > 0.75
    x, y = data.client_data(1)
    batch = next(x.split(len(x))).content
    assert torch.equal(batch[1], y)
