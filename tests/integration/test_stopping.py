"""A signal ends a run after its round, on all of its processes; a process that is lost ends it in a sentence."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.federation import invoke
from tests.processes import fork, fork_two, wait_until

MANY = 100_000
EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}


def endless(folder: Path, *more: str) -> None:
    """Run `fedlight fit` until something stops it, and say in ``rounds`` how many rounds are done."""
    options = ["--trainer.max_steps", str(MANY), "--checkpoint.every_n_rounds", "1000", "--trainer.val_check_interval", "5"]
    slow = ["--trainer.callbacks", "tests.federation.Slow", "--trainer.callbacks.marker", str(folder / "rounds")]
    invoke("fit", folder, *options, *slow, "--trainer.callbacks.seconds", "0.01", *more)


def rounds(folder: Path) -> int:
    return int((folder / "rounds").read_text() or 0) if (folder / "rounds").exists() else 0


def saved_rounds(folder: Path) -> int:
    (last,) = folder.glob("federated/**/checkpoints/last.ckpt")
    assert not list(last.parent.glob("*.tmp"))
    return int(torch.load(last, weights_only=False)["global_step"])


def two(folder: Path, *more: str) -> list:
    pair = fork_two(lambda: endless(folder, "--trainer.devices", "2", *(more or ("--trainer.strategy", "ddp"))), folder)
    wait_until(lambda: rounds(folder) >= 7 or any(process.poll() is not None for process in pair), pair)
    return pair


@pytest.mark.parametrize(
    ("ranks", "number"),
    [([0], signal.SIGTERM), ([1], signal.SIGTERM), ([0, 1], signal.SIGTERM), ([1], signal.SIGINT), ([0, 1], signal.SIGINT)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "ranks " + "".join(map(str, value)),
)
def test_two_processes_stop_after_the_same_round(ranks, number, tmp_path):
    """Whoever gets the signal: no round is lost, none is done by one process alone, and both end."""
    pair = two(tmp_path)
    for rank in ranks:
        pair[rank].send(number)
    assert [process.wait(60) for process in pair] == [EXIT[number]] * 2, [process.last_words() for process in pair]
    assert saved_rounds(tmp_path) == rounds(tmp_path) < MANY
    told = pair[0].last_words()
    assert f"stopped by {number.name}" in told and "go on with\n  fedlight fit --config" in told and "last.ckpt" in told
    assert "Traceback" not in told + pair[1].last_words()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_lost_ends_the_others_in_a_sentence(number, tmp_path):
    """One that stands still after the processes' patience, here 5 seconds; one that has ended at once."""
    pair = two(tmp_path, "--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "0:0:5")
    pair[1].send(number)
    try:
        assert pair[0].wait(30) == 2, pair[0].last_words()
        what = "stands still" if number == signal.SIGSTOP else "has ended"
        assert f"fedlight: error: Expected all processes of the run to take part but another one {what}" in pair[0].last_words()
    finally:
        for process in pair:
            process.send(signal.SIGKILL)
            process.wait()


def test_ctrl_c_ends_after_the_round_and_twice_at_once(tmp_path):
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    once = fork(lambda: endless(tmp_path / "once"), tmp_path / "once.txt")
    twice = fork(lambda: endless(tmp_path / "twice", "--trainer.callbacks.seconds", "1000"), tmp_path / "twice.txt")
    wait_until(lambda: rounds(tmp_path / "once") >= 7 and rounds(tmp_path / "twice") >= 4, [once, twice])
    once.send(signal.SIGINT)
    assert once.wait(60) == 130, once.last_words()
    assert saved_rounds(tmp_path / "once") == rounds(tmp_path / "once")
    assert "go on with\n  fedlight fit --config" in once.last_words() and "Traceback" not in once.last_words()
    twice.send(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again stops at once" in twice.last_words(), [twice], 30)
    twice.send(signal.SIGINT)
    assert twice.wait(60) == 130, twice.last_words()
    assert saved_rounds(tmp_path / "twice") == 0, "the round under way is lost, the checkpoint is not"
