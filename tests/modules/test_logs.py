import csv

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.federation import federated, federated_data, trainer


def steps_logged(folder, **changes):
    logger = CSVLogger(folder, version=0)
    fit = trainer(6, logger=logger, **changes)
    fit.fit(federated(), datamodule=federated_data())
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return fit, [int(row["step"]) for row in csv.DictReader(file) if row["bytes/uplink"]]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3])])
def test_loggers_are_given_every_nth_round(every, steps, tmp_path):
    assert steps_logged(tmp_path, log_every_n_steps=every)[1] == steps


def test_callbacks_can_watch_a_rounds_figures_whatever_is_logged(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="sim/loss", every_n_train_steps=1)
    stop = EarlyStopping("bytes/uplink", mode="min", patience=2, check_on_train_epoch_end=False)
    fit = trainer(20, callbacks=[best, stop], enable_checkpointing=True, log_every_n_steps=50, limit_val_batches=1, val_check_interval=1)
    fit.fit(federated(), datamodule=federated_data())
    assert fit.global_step == 3 and fit.callback_metrics["round/clients"] == 8  # the bytes only ever grow
    assert float(best.best_model_score) > 0
