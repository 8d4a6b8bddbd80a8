import os

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fedlight.callbacks import RoundCheckpoint
from fedlight.core.errors import ConfigurationError
from tests.federation import Spy, federated, federated_data, trainer


class Watch(Spy):
    """Notes which round the checkpoint holds when each round ends, and what else lies beside it."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.seen = folder, []

    def on_round_end(self, trainer, pl_module, round):
        if (self.folder / "last.ckpt").exists():
            self.seen.append((round.context.round, torch.load(self.folder / "last.ckpt", weights_only=False)["global_step"]))
        assert len(list(self.folder.glob("*"))) in (0, 2), "the checkpoint and its file of clients"


def saved_step(folder):
    return torch.load(folder / "last.ckpt", weights_only=False)["global_step"]


def test_saved_at_the_start_every_few_rounds_and_at_the_end(tmp_path):
    watch = Watch(tmp_path)
    trainer(7, enable_checkpointing=True, callbacks=[RoundCheckpoint(3, str(tmp_path)), watch]).fit(
        federated(), datamodule=federated_data()
    )
    assert watch.seen == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3), (6, 6)]
    assert saved_step(tmp_path) == 7
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".clients.keep-secret")] == ["last.ckpt"]


def test_the_whole_run_is_in_it(tmp_path):
    module = federated()
    trainer(2, enable_checkpointing=True, callbacks=[RoundCheckpoint(dirpath=str(tmp_path))]).fit(module, datamodule=federated_data())
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert state["fedlight"]["server"]["traffic"] == vars(module.server_state.traffic)
    assert {"fingerprint", "codec", "server", "clients_file"} <= set(state["fedlight"])
    assert len(state["optimizer_states"]) == 1


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_one(tmp_path, monkeypatch):
    callback = RoundCheckpoint(1, str(tmp_path))
    runner = trainer(2, enable_checkpointing=True, callbacks=[callback])
    runner.fit(federated(), datamodule=federated_data())
    before = (tmp_path / "last.ckpt").read_bytes()
    callback._saved = -1
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            callback.on_train_end(runner, runner.model)
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(("exception", "saved"), [(SIGTERMException(), True), (RuntimeError(), False), (KeyboardInterrupt(), False)])
def test_saved_on_sigterm_but_not_within_a_round(exception, saved, tmp_path):
    callback = RoundCheckpoint(100, str(tmp_path))
    runner = trainer(2, enable_checkpointing=True, callbacks=[callback])
    runner.fit(federated(), datamodule=federated_data())
    (tmp_path / "last.ckpt").unlink()
    callback._saved = -1
    callback.on_exception(runner, runner.model, exception)
    assert (tmp_path / "last.ckpt").exists() == saved


def test_nothing_is_written_in_a_fast_dev_run(tmp_path):
    runner = trainer(1, enable_checkpointing=True, callbacks=[RoundCheckpoint(1, str(tmp_path))], fast_dev_run=True)
    runner.fit(federated(), datamodule=federated_data())
    assert list(tmp_path.iterdir()) == []


def test_a_period_below_one_is_refused():
    with pytest.raises(ConfigurationError, match="`every_n_rounds` >= 1 but got 0"):
        RoundCheckpoint(0)
