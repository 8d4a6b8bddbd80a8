"""A Trainer with Lightning's defaults logs every round, validates and shows rounds; what is set stays."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar

from fedlight import RoundProgressBar
from fedlight.modules.notices import suit_rounds
from tests.federation import History, federated, federated_data, mlp

ROUNDS = 20


def plain(**changes) -> Trainer:
    return Trainer(accelerator="cpu", max_steps=ROUNDS, enable_checkpointing=False, enable_model_summary=False, **changes)


def test_a_plain_trainer_logs_every_round_and_validates_ten_times(capsys):
    history = History()
    trainer = plain(logger=history)
    trainer.fit(federated(mlp()), datamodule=federated_data())
    assert [*history.rounds("bytes/uplink")] == [*range(ROUNDS)]
    assert len(history.rounds("val/accuracy")) == 10
    told = capsys.readouterr().err
    assert f"Round {ROUNDS}/{ROUNDS}" in told and "val acc" in told and "Epoch" not in told


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_lightnings_own_bar_gives_way(bar):
    trainer = plain(callbacks=[bar()], logger=False)
    suit_rounds(trainer)
    assert isinstance(trainer.progress_bar_callback, RoundProgressBar)
    assert len([one for one in trainer.callbacks if isinstance(one, (RichProgressBar, TQDMProgressBar))]) == 1


def test_what_was_set_stays():
    trainer = plain(callbacks=[RichProgressBar(refresh_rate=3)], log_every_n_steps=7, val_check_interval=4, check_val_every_n_epoch=None)
    suit_rounds(trainer)
    assert (trainer.log_every_n_steps, trainer.val_check_interval, trainer.check_val_every_n_epoch) == (7, 4, None)
    assert type(trainer.progress_bar_callback) is RichProgressBar
    quiet = plain(enable_progress_bar=False, logger=False)
    suit_rounds(quiet)
    assert quiet.progress_bar_callback is None and not any(isinstance(one, ModelSummary) for one in quiet.callbacks)


def test_a_run_of_unknown_length_is_validated_now_and_then():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_time="00:00:01:00", max_epochs=-1)
    suit_rounds(trainer)
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (10, None)
