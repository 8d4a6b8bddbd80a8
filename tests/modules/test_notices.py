"""Flags, callbacks, losses, metrics and clients that would make a run other than it says: told, or refused, before training."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner import Tuner
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score, MulticlassPrecision, MulticlassRecall

import fedlight
from fedlight.aggregation import SecureAggregator
from fedlight.callbacks import CodecPretraining
from fedlight.callbacks.base import tell
from fedlight.clients import ClientOptimizer, FedAvg
from fedlight.core.errors import ConfigurationError, RoundFailedError
from fedlight.core.pretraining import ProxyFederation
from fedlight.data import IID, Explicit, LightningData, Poisson, Uniform, build_arrays
from fedlight.modules import FederatedModule
from tests.federation import Blobs, History, federated, federated_data, learned, mlp, trainer

ALL = {"limit_val_batches": 1.0}
NEVER = {"val_check_interval": 3, "check_val_every_n_epoch": None}
AS_IT_COMES = {"val_check_interval": None, "check_val_every_n_epoch": 1}  # of a run of two rounds


def told(recwarn, sentence: str) -> int:
    return sum(sentence in str(item.message) for item in recwarn)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (ALL | AS_IT_COMES, [0, 0, 0]),  # `suit_rounds` gives it an interval
        (ALL | AS_IT_COMES | {"callbacks": [ModelCheckpoint(monitor="val/loss")], "enable_checkpointing": True}, [0, 0, 0]),
        (ALL | NEVER | {"callbacks": [ModelCheckpoint(monitor="val/loss")], "enable_checkpointing": True}, [1, 1, 0]),
        (ALL | NEVER | {"callbacks": [ModelCheckpoint(monitor="sim/loss")], "enable_checkpointing": True}, [1, 0, 0]),
        (ALL | NEVER, [1, 0, 0]),
        (ALL | {"val_check_interval": 2, "check_val_every_n_epoch": None}, [0, 0, 0]),
        ({"limit_val_batches": 0}, [0, 0, 0]),
        ({"limit_val_batches": 0, "logger": History(), "log_every_n_steps": 50}, [0, 0, 0]),  # Lightning's default: every round
        ({"limit_val_batches": 0, "logger": History(), "log_every_n_steps": 3}, [0, 0, 1]),
        ({"limit_val_batches": 0, "logger": History(), "log_every_n_steps": 2}, [0, 0, 0]),
    ],
)
def test_a_run_that_shows_nothing_says_so_once_and_names_the_flag(flags, expected, recwarn, tmp_path):
    runner = trainer(2, default_root_dir=tmp_path, **flags)
    runner.fit(federated(), datamodule=federated_data())
    sentences = (
        "max_steps` (2) is below `trainer.val_check_interval` (3): nothing",
        "saves nothing, because nothing is validated",
        "No round will be logged",
    )
    assert [told(recwarn, sentence) for sentence in sentences] == expected
    assert told(recwarn, "set `trainer.val_check_interval`") == sum(expected[:2])


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: StochasticWeightAveraging(0.1, 1), "StochasticWeightAveraging.*the server's learning rate.*use WeightAveraging"),
        (LearningRateFinder, "LearningRateFinder.*your own module and a plain Trainer"),
        (BatchSizeFinder, "BatchSizeFinder.*set `batch_size` of `algorithm`"),
        (lambda: GradientAccumulationScheduler({0: 2}), "GradientAccumulationScheduler"),
        (BackboneFinetuning, "BackboneFinetuning.*`requires_grad`"),
    ],
)
def test_callbacks_that_cannot_do_what_they_say_are_refused(callback, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(1, callbacks=[callback()]).fit(federated(), datamodule=federated_data())


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_fast_dev_run_says_what_it_does_and_pretrains_briefly(rounds, recwarn):
    many = CodecPretraining(ProxyFederation(rounds=10, clients=4, samples=10, trajectories=8))
    recorded, runner = [], trainer(5, fast_dev_run=rounds, callbacks=[many])
    module = federated(codec=learned())
    fit = module.pretrain
    module.pretrain = lambda proxy, training: recorded.append((proxy.rounds, training.steps)) or fit(proxy, training)
    runner.fit(module, datamodule=federated_data())
    assert recorded == [(6, 10)] and runner.global_step == rounds
    assert told(recwarn, f"`trainer.fast_dev_run` tries the code with {rounds} round") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"min_epochs": 2}, "no `trainer.min_epochs` but got 2.*`trainer.min_steps`"),
        ({"min_steps": 5}, "`trainer.min_steps` of at most `trainer.max_steps` 2 but got 5"),
        ({"val_check_interval": 0.5}, "`trainer.val_check_interval` to be a number of rounds but got 0.5"),
    ],
)
def test_flags_of_epochs_are_refused_before_anything_is_trained(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(2, **flags).fit(federated(), datamodule=federated_data())


@pytest.mark.parametrize(
    ("parts", "sampler", "message"),
    [
        (
            {"min_clients": 6},
            Uniform(4),
            r"`min_clients` that .* got 6 and `data.sampler` \(Uniform\) draws at most 4 of 8",
        ),
        ({"min_clients": 9}, Poisson(0.5), "got 9 and .*Poisson.* at most 8 of 8"),
        ({"aggregator": SecureAggregator(cohort=8, threshold=6)}, Uniform(4), "`threshold` of SecureAggregator that cohorts can reach but"),
    ],
)
def test_cohorts_that_can_never_be_large_enough_are_refused_before_pretraining(parts, sampler, message, monkeypatch):
    module = federated(codec=learned(), **parts)
    monkeypatch.setattr(module, "pretrain", lambda *_: pytest.fail("it was pretrained"))
    with pytest.raises(ConfigurationError, match=message):
        trainer(1).fit(module, datamodule=federated_data(sampler=sampler))


class Enough(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = True


def test_a_run_that_is_to_stop_does_so_after_its_least_number_of_rounds():
    runner = trainer(20, min_steps=3, callbacks=[Enough()])
    runner.fit(federated(), datamodule=federated_data())
    assert runner.global_step == 3


def test_validations_may_be_timed(tmp_path):
    runner = trainer(2, limit_val_batches=1.0, val_check_interval="00:00:00:01", check_val_every_n_epoch=None)
    runner.fit(federated(), datamodule=federated_data())
    assert runner.global_step == 2


def test_a_notice_is_shown_as_its_sentence_alone(monkeypatch):
    shown, before = [], warnings.formatwarning
    monkeypatch.setattr(warnings, "showwarning", lambda *args: shown.append(warnings.formatwarning(*args[:4])))
    tell("Nothing will be validated")
    assert shown == ["Nothing will be validated\n"] and warnings.formatwarning is before


class Watching(Callback):
    def on_after_backward(self, trainer, pl_module):
        raise AssertionError("clients' training has no callbacks")


class Averaging(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Average the weights, say."""


class Setting(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.noted = "what is nobody's"
        pl_module.layer = None


class Reading(Callback):
    def on_train_start(self, trainer, pl_module):
        assert pl_module.module.layer is not None and not hasattr(pl_module, "nothing")
        pl_module.layer  # noqa: B018


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"callbacks": [Watching()]}, "Watching.on_after_backward is never called.*a hook of your own LightningModule"),
        ({"callbacks": [EarlyStopping("train_loss")]}, "EarlyStopping.monitor='train_loss'. never looks, because nothing is validated"),
        (
            {"callbacks": [Averaging()]},
            "Averaging.on_train_batch_end is called once a round, on the global model: what belongs to a client's",
        ),
        ({"callbacks": [LearningRateMonitor()], "logger": History()}, "LearningRateMonitor logs .* the server's optimizer"),
        ({"limit_train_batches": 2}, "`trainer.limit_train_batches` counts rounds.*set `steps` of `algorithm`"),
    ],
)
def test_what_a_users_module_would_take_for_a_clients_is_told(flags, sentence):
    with pytest.warns(UserWarning, match=sentence):
        trainer(2, **flags).fit(fedlight.federate(BoringModel(), num_clients=2))


def test_no_advice_that_is_meant_for_batches(recwarn, tmp_path):
    class WithoutEvaluation(BoringModel):
        val_dataloader = LightningModule.val_dataloader

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer(2, callbacks=[saver], enable_checkpointing=True, **ALL).fit(fedlight.federate(WithoutEvaluation(), num_clients=2))
    assert not told(recwarn, "manual optimization") and not told(recwarn, "Total length")


def test_what_is_looked_for_in_the_wrong_place_or_given_twice_names_the_right_one():
    with pytest.raises(AttributeError, match="'layer' is one of its BoringModel: read it from `FederatedModule.module`"):
        trainer(1, callbacks=[Reading()]).fit(fedlight.federate(BoringModel(), num_clients=2))
    with pytest.raises(AttributeError, match="'layer' is one of its BoringModel: set it in `FederatedModule.module`, and in `setup` or"):
        trainer(1, callbacks=[Setting()]).fit(fedlight.federate(BoringModel(), num_clients=2))
    own = BoringModel()
    with pytest.raises(ConfigurationError, match="got `train_dataloaders`, whose batches would be taken for rounds"):
        trainer(1).fit(fedlight.federate(own, num_clients=2), train_dataloaders=own.train_dataloader())
    with pytest.raises(ConfigurationError, match="no `trainer.limit_train_batches` but got 0.5"):
        trainer(1, limit_train_batches=0.5).fit(fedlight.federate(own, num_clients=2))


def test_epochs_beside_rounds_are_refused():
    with pytest.raises(ConfigurationError, match="no `trainer.max_epochs` beside `trainer.max_steps` 2 but got 5: a federated run"):
        trainer(2, max_epochs=5).fit(federated(), datamodule=federated_data())


def test_batches_to_overfit_are_refused_and_loaders_that_are_not_made_again_are_told(recwarn):
    with pytest.raises(ConfigurationError, match="no `trainer.overfit_batches` but got 1"):
        trainer(1, overfit_batches=1).fit(federated(), datamodule=federated_data())
    trainer(1, reload_dataloaders_every_n_epochs=1).fit(federated(), datamodule=federated_data())
    assert told(recwarn, "No loader will be made again") == 1


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_lightnings_tuner_is_refused(search):
    with pytest.raises(ConfigurationError, match="Finder in a federated run"):
        getattr(Tuner(trainer(1)), search)(federated(), datamodule=federated_data())


def test_averaging_of_the_global_model_goes_on_working():
    trainer(3, callbacks=[EMAWeightAveraging(decay=0.5)]).fit(federated(), datamodule=federated_data())


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, y):
        return nn.functional.cross_entropy(x @ self.centres, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": Centres()}, "`loss` without parameters.*Centres has some.*a part of a LightningModule"),
        ({"server_scheduler": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=1)}, "got ReduceLROnPlateau, which waits for a"),
        ({"server_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "got ReduceLROnPlateau"),
        ({"metrics": {"loss": MulticlassF1Score(3)}}, "free and without dots but got 'loss'"),
        ({"metrics": {"accuracy": MulticlassF1Score(3)}}, "got 'accuracy'"),
        ({"metrics": {"client_accuracy_mean": MulticlassF1Score(3)}}, "got 'client_accuracy_mean'"),
        ({"metrics": {"all_f1": MulticlassF1Score(3), "all": MetricCollection({"f1": MulticlassF1Score(3)})}}, "got 'all_f1'"),
        ({"metrics": {"f1": nn.ReLU()}}, "'f1' is a ReLU"),
    ],
)
def test_parts_that_a_run_would_not_honour_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        FederatedModule(mlp(), **arguments)


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        ({"all": MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)])}, {"all_MulticlassPrecision", "all_MulticlassRecall"}),
        (MetricCollection({"p": MulticlassPrecision(3), "r": MulticlassRecall(3)}), {"p", "r"}),
        (MetricCollection([MulticlassF1Score(3)], prefix="m_"), {"m_MulticlassF1Score"}),
    ],
)
def test_collections_of_metrics_are_logged_one_by_one(metrics, names):
    module = federated(metrics=metrics)
    figures = trainer(1, **ALL).validate(module, datamodule=federated_data(), verbose=False)[0]
    assert {name.removeprefix("val/") for name in figures} - {"loss", "accuracy"} == names
    reference = MulticlassPrecision(3)
    data = module.data
    if "p" in names:
        assert figures["val/p"] == pytest.approx(float(reference(module.network(data.val[0]), data.val[1])))


@pytest.mark.parametrize(
    ("metric", "message"),
    [(MulticlassF1Score(7), "'f' .MulticlassF1Score. says"), (MulticlassConfusionMatrix(3), "one number each but 'f'")],
)
def test_metrics_are_tried_before_training(metric, message):
    module = federated(metrics={"f": metric})
    with pytest.raises(ConfigurationError, match=message):
        trainer(1).fit(module, datamodule=federated_data())
    assert not module.server_state.rounds


@pytest.mark.parametrize(
    ("local", "sizes", "refused"),
    [
        ({"epochs": 1, "batch_size": 8}, [16, 17, 16], True),
        ({"steps": 3, "batch_size": 8}, [16, 17, 16], False),
        ({"steps": 3, "batch_size": 8}, [16, 1, 16], True),
        ({"epochs": 1, "batch_size": 8}, [16, 18, 16], False),
        ({"epochs": 1, "batch_size": 1}, [16, 18, 16], True),
    ],
)
@pytest.mark.parametrize("algorithm", [FedAvg, lambda **local: ClientOptimizer(partial(torch.optim.SGD, lr=0.1), **local)])
def test_batches_of_one_sample_for_batch_norm_are_told_before_training(algorithm, local, sizes, refused):
    lists = [list(range(40 * i, 40 * i + size)) for i, size in enumerate(sizes)]
    module, data = (
        federated(mlp(norm=True), algorithm=algorithm(**local)),
        federated_data(partitioner=Explicit(lists), num_clients=None, proxy_samples=0),
    )
    if refused:
        with pytest.raises(ConfigurationError, match=r"at least two samples for the BatchNorm1d layers.*`min_samples` 2"):
            trainer(1).fit(module, datamodule=data)
        assert not module.server_state.rounds
    else:
        trainer(1).fit(module, datamodule=data)


def test_an_image_of_one_sample_has_many_numbers_a_channel():
    network = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 3))
    trainer(1).fit(federated(network, algorithm=FedAvg(steps=1, batch_size=1)), datamodule=federated_data())


class Spoilt(LightningModule):
    """A linear layer whose loss, or buffer, is spoilt."""

    def __init__(self, how: str, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.how, self.lr = nn.Linear(6, 3), how, lr
        self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        if self.how == "buffer":
            self.seen.fill_(torch.inf)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * torch.nan if self.how == "loss" else (loss * 1e30).square() if self.how == "growth" and batch_idx else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    ("how", "way_out"),
    [("loss", "look for NaN or Inf in clients' samples, in the loss"), ("buffer", "buffers"), ("growth", "lower the client learning rate")],
)
def test_a_round_that_fails_says_why_and_lowers_the_rate_only_where_updates_grew(how, way_out):
    module = FederatedModule(Spoilt(how), max_attempts=1)
    with pytest.raises(RoundFailedError) as caught:
        trainer(1).fit(module, datamodule=federated_data(partitioner=IID()))
    assert way_out in str(caught.value) and ("lower the client learning rate" in str(caught.value)) == (how == "growth")


class Labelled(Blobs):
    """Clusters whose labels are other numbers."""

    def __init__(self, first: int, step: int) -> None:
        super().__init__()
        self.first, self.step = first, step

    def load(self, root):
        data = super().load(root)
        y, test = (self.first + self.step * part for part in (data.y_train, data.y_test))
        return build_arrays(data.x_train.numpy(), y.numpy(), data.x_test.numpy(), test.numpy(), None, source=self.name)


@pytest.mark.parametrize(
    ("source", "message"),
    [(Labelled(0, 0), "at least two classes"), (Labelled(1, 1), r"number its 3 classes from 0 \(they are 1 to 3\)")],
)
def test_labels_that_leave_classes_empty_are_named(source, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(1).fit(federated(), datamodule=federated_data(source=source, partitioner=IID()))


@pytest.mark.parametrize("kind", [LightningModule, LightningDataModule], ids=["module", "data module"])
def test_the_twin_package_of_lightning_is_refused(kind):
    """`import pytorch_lightning` gives classes that look the same, and that nothing of `lightning` recognises."""
    base = type(kind.__name__, (nn.Module,), {"__module__": "pytorch_lightning.core.module"})
    other = type("Mine", (base,), {})()
    with pytest.raises(ConfigurationError, match="Mine derives from a class of pytorch_lightning.*import lightning.pytorch as pl"):
        FederatedModule(other) if kind is LightningModule else LightningData(other)
