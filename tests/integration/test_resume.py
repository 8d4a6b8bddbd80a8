"""Law 5 over time: a run that was cut off and goes on ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.callbacks import CodecPretraining
from fedlight.core.checkpoint import read_checkpoint
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.export import codec_state
from fedlight.data import Dirichlet, Everyone, Uniform
from tests.federation import CODEC, History, federated, federated_data, invoke, learned, mlp, pretraining, run_folders, trainer, weights_of
from tests.processes import fork, wait_until

RUNS: dict[str, dict[str, Any]] = {
    "identity": {},
    "learned": {
        "codec": learned,
        "server_optimizer": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
        "server_scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
    },
    "adam": {"server_optimizer": lambda params: torch.optim.Adam(params, lr=0.05)},
}


def make(kind: str, norm: bool = False, **changes: Any):
    settings = {name: value() if name == "codec" else value for name, value in RUNS[kind].items()}
    network = mlp(dropout=0.2, norm=norm)
    return federated(network, batch_norm="local" if norm else "mean", **settings | changes)


def data(**changes: Any):
    return federated_data(**{"sampler": Uniform(4)} | changes)


def fit(module, rounds, ckpt_path=None, federation=None, callback=None):
    history = History()
    runner = trainer(rounds, logger=history, callbacks=[callback or pretraining()])
    runner.fit(module, datamodule=federation or data(), ckpt_path=ckpt_path, weights_only=False)
    return runner, history


class NeverAgain(CodecPretraining):
    """A pretraining phase that must not happen."""

    def on_fit_start(self, trainer, pl_module):
        assert pl_module.codec.fitted
        pl_module.pretrain = None
        super().on_fit_start(trainer, pl_module)


@pytest.mark.quick(2)
@pytest.mark.parametrize("norm", [False, True], ids=["", "local BatchNorm"])
@pytest.mark.parametrize("kind", RUNS)
def test_ten_rounds_are_five_and_five_more(kind, norm, tmp_path):
    straight = make(kind, norm)
    whole, history = fit(straight, 10)
    runner, _ = fit(make(kind, norm), 5)
    runner.save_checkpoint(tmp_path / "five.ckpt")
    resumed = make(kind, norm)
    runner, rest = fit(resumed, 10, ckpt_path=tmp_path / "five.ckpt", callback=NeverAgain())

    assert runner.global_step == whole.global_step == 10
    assert torch.equal(weights_of(resumed), weights_of(straight))
    assert resumed.server_state.traffic == straight.server_state.traffic
    assert resumed.server_state.settled == straight.server_state.settled
    assert resumed.downlink.versions == straight.downlink.versions
    for client in range(8):
        mine, theirs = (m.store.peek(client).get("norm", {}) for m in (resumed, straight))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if straight.codec.version:
        one, two = codec_state(resumed.codec), codec_state(straight.codec)
        assert one["description"] == two["description"]
        assert all(torch.equal(one[half][k], two[half][k]) for half in ("encoder", "decoder") for k in one[half])
    assert resumed.server_state.decoder == straight.server_state.decoder
    assert bool(straight.server_state.decoder) == (kind == "learned")
    assert min(rest.steps) == 5
    for name in ("sim/loss", "round/aggregate_norm", "bytes/uplink"):
        assert rest.rounds(name) == {step: value for step, value in history.rounds(name).items() if step >= 5}


def test_the_scheduler_and_seconds_go_on(tmp_path):
    runner, _ = fit(make("learned"), 3)
    runner.save_checkpoint(tmp_path / "three.ckpt")
    before = runner.model.train_seconds, runner.model.pretrain_seconds
    resumed = make("learned")
    fit(resumed, 4, ckpt_path=tmp_path / "three.ckpt")
    assert resumed.train_seconds > before[0] > 0
    assert resumed.pretrain_seconds == before[1] > 0
    straight, _ = fit(make("learned"), 4)
    assert resumed.lr_schedulers().last_epoch == straight.model.lr_schedulers().last_epoch == 4


@pytest.mark.parametrize(
    ("changes", "federation", "named"),
    [
        ({"network": mlp(hidden=9)}, {}, "network"),
        ({"codec": learned()}, {}, "codec"),
        ({"weighting": "samples"}, {}, "weighting"),
        ({"batch_norm": "local"}, {}, "batch_norm"),
        ({"seed": 4}, {}, "seed"),
        ({}, {"partitioner": Dirichlet(5.0)}, "data and partition"),
        ({}, {"num_clients": 9}, "data and partition"),
        ({}, {"sampler": Everyone()}, "client sampler"),
    ],
    ids=["network", "codec", "weighting", "batch_norm", "seed", "partitioner", "clients", "sampler"],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(changes, federation, named, tmp_path):
    runner, _ = fit(federated(), 1)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    before = (tmp_path / "one.ckpt").read_bytes()
    with pytest.raises((ConfigurationError, CodecMismatchError), match=rf"differs in: .*{named}"):
        fit(federated(**changes), 2, ckpt_path=tmp_path / "one.ckpt", federation=data(**federation))
    assert (tmp_path / "one.ckpt").read_bytes() == before


def test_a_checkpoint_without_federated_state_is_refused(tmp_path):
    runner, _ = fit(federated(), 1)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = read_checkpoint(tmp_path / "one.ckpt")
    del checkpoint["fedlight"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigurationError, match="no federated state"):
        fit(federated(), 2, ckpt_path=tmp_path / "foreign.ckpt")


# -- real signals to a real process ------------------------------------------------------------------------------------

ROUNDS = 8


def fit_command(folder: Path, *more: str) -> None:
    options = ["--trainer.max_steps", str(ROUNDS), "--checkpoint.every_n_rounds", "3", "--model.codec", CODEC]
    invoke("fit", folder, *options, "--trainer.val_check_interval", "4", *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit_command(folder)
    return run_folders(folder)[0]


@pytest.mark.quick(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_to_the_same_model(number, uninterrupted, tmp_path):
    """SIGTERM and Ctrl-C leave a checkpoint of the round they struck in; SIGKILL the last regular one, whole."""
    marker = tmp_path / "rounds"
    slow = ["--trainer.callbacks", "tests.federation.Slow", "--trainer.callbacks.marker", str(marker), "--trainer.callbacks.seconds", "1.5"]
    process = fork(lambda: fit_command(tmp_path, *slow), tmp_path / "output.txt")
    wait_until(lambda: process.poll() is not None or (marker.exists() and marker.read_text() >= "5"), [process])
    process.send(number)
    assert process.wait() == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[number], process.last_words()
    done = int(marker.read_text())
    assert 5 <= done < ROUNDS
    (folder,) = run_folders(tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=False)["global_step"]
    assert saved == (done - done % 3 if number == signal.SIGKILL else done)
    if number != signal.SIGKILL:
        assert f"fedlight fit --config {folder / 'config.yaml'} --ckpt_path {last}" in process.last_words()
        assert "Traceback" not in process.last_words()
    assert not (folder / "model.safetensors").exists()
    before = last.read_bytes()

    fit_command(tmp_path, "--ckpt_path", str(last))
    first, second = run_folders(tmp_path)
    assert first == folder and last.read_bytes() == before, "the interrupted run was not left alone"
    for name in ("model", "encoder", "decoder"):
        mine, theirs = (load_file(place / f"{name}.safetensors") for place in (second, uninterrupted))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), name
    events = EventAccumulator(str(second)).Reload()
    assert [point.step for point in events.Scalars("communication/uplink_total")] == [*range(ROUNDS)], "the curve goes on"
    ours, reference = (json.loads((place / "summary.json").read_text()) for place in (second, uninterrupted))
    for name in ("rounds", "uplink_bytes", "downlink_bytes", "codec_bytes", "test_accuracy", "uplink_ratio"):
        assert ours[name] == reference[name], name


def test_a_finished_run_is_extended_by_raising_max_steps(tmp_path):
    runner, _ = fit(make("learned"), 4)
    runner.save_checkpoint(tmp_path / "four.ckpt")
    extended = make("learned")
    again, _ = fit(extended, 6, ckpt_path=tmp_path / "four.ckpt")
    straight = make("learned")
    fit(straight, 6)
    assert again.global_step == 6
    assert torch.equal(weights_of(extended), weights_of(straight))


def test_a_finished_run_that_was_validated_last_goes_on_for_longer(tmp_path):
    """Its checkpoint is saved when network and loss are in evaluation mode, which is no setting."""
    options = (
        "--trainer.val_check_interval",
        "2",
        "--data.val_fraction",
        "0.1",
        "--checkpoint.every_n_rounds",
        "2",
        "--model.codec",
        CODEC,
    )
    invoke("fit", tmp_path, *options, "--trainer.max_steps", "2")
    (first,) = run_folders(tmp_path)
    invoke("fit", tmp_path, *options, "--trainer.max_steps", "3", "--ckpt_path", str(first / "checkpoints" / "last.ckpt"))
    assert [json.loads((folder / "summary.json").read_text())["rounds"] for folder in run_folders(tmp_path)] == [2, 3]
