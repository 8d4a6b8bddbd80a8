"""What is said of clients one by one, of personal models, and of metrics of the user's own."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

from fedlight.clients import Ditto, FedAvg
from fedlight.core.errors import ConfigurationError
from fedlight.metrics import accuracy_by_size
from tests.federation import federated, federated_data, trainer


def test_accuracy_by_size_is_the_mean_over_quarters_of_the_clients():
    sizes = torch.tensor([8, 1, 7, 2, 6, 3, 5, 4, 100])
    total = torch.tensor([1] * 8 + [0])  # the largest client has nothing to evaluate on
    correct = (sizes > 4).long() * total
    values = [float(value) for value in accuracy_by_size(correct, total, sizes).values()]
    assert values == [0, 0, 1, 1]
    assert list(accuracy_by_size(correct[:2], total[:2], sizes[:2])) == ["size_1", "size_2"]


def test_personal_models_are_evaluated_beside_the_global_one():
    module, data = federated(algorithm=Ditto(0.0, lr=0.2, batch_size=8, steps=20)), federated_data(client_holdout=0.3)
    runner = trainer(3, limit_val_batches=1.0)
    runner.fit(module, datamodule=data)
    figures = runner.validate(module, datamodule=data, verbose=False)[0]
    right = []
    for client in range(8):
        weights = module.algorithm.personal(module.store.peek(client)["algorithm"])[0]
        index = torch.from_numpy(data.holdout[client])
        tensors = dict(zip(module.layout.names, module.layout.split(weights), strict=True))
        logits = torch.func.functional_call(module.network.eval(), tensors, (data.x[index],))
        right.append(float((logits.argmax(-1) == data.y[index]).float().mean()))
    assert figures["val/personal_accuracy_mean"] == pytest.approx(sum(right) / 8, abs=1e-6)
    assert {"val/client_accuracy_mean", "val/client_accuracy_worst", "val/client_accuracy_size_1"} <= set(figures)


@pytest.mark.parametrize(
    ("algorithm", "holdout", "warned"), [(Ditto(steps=1), 0.0, True), (Ditto(steps=1), 0.3, False), (FedAvg(steps=1), 0.0, False)]
)
def test_personal_models_that_nothing_evaluates_are_told_before_training(algorithm, holdout, warned, recwarn):
    trainer(1).fit(federated(algorithm=algorithm), datamodule=federated_data(client_holdout=holdout))
    told = [str(item.message) for item in recwarn if "`data.client_holdout` is 0" in str(item.message)]
    assert len(told) == warned


def test_any_metric_is_logged_and_chooses_the_best_checkpoint(tmp_path):
    module = federated(metrics={"f1": MulticlassF1Score(3)})
    best = ModelCheckpoint(tmp_path, monitor="val/f1", mode="max")
    logger = TensorBoardLogger(tmp_path)
    runner = trainer(
        4,
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
        callbacks=[best],
        logger=logger,
    )
    runner.fit(module, datamodule=federated_data(client_holdout=0.3))
    assert best.best_model_score == max(best.best_k_models.values()) > 0
    events = EventAccumulator(logger.log_dir, {"histograms": 0}).Reload()
    assert len(events.Histograms("clients/accuracy")) == 4 == len(events.Scalars("val/f1"))


def test_a_metric_that_is_no_number_is_refused():
    module = federated(metrics={"confusion": MulticlassConfusionMatrix(3)})
    with pytest.raises(ConfigurationError, match="one number each but 'confusion'"):
        trainer(1, limit_val_batches=1.0).validate(module, datamodule=federated_data(), verbose=False)
