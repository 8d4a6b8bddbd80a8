from __future__ import annotations

import io
import logging
import pickle
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch.utils.data import DataLoader, IterableDataset
from tqdm._monitor import TMonitor

from fedlight.callbacks.progress import RoundProgressBar
from fedlight.core.errors import ConfigurationError


class Rounds(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        index = 0
        while True:
            yield index
            index += 1


class Federated(LightningModule):
    """The shape of a federated run: one optimizer step a round, stepped by hand."""

    def __init__(self, fail: BaseException | None = None, fail_at: int = 3, skip: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.fail, self.fail_at, self.skip = fail, fail_at, skip

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: int, batch_idx: int) -> None:
        if self.fail is not None and self.global_step == self.fail_at:
            raise self.fail
        if batch_idx in self.skip:
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.weight.sum().backward()
        optimizer.step()
        done = float(self.global_step)
        self.log_dict({"sim/loss": 1 / done, "bytes/uplink": 1000.0 * done, "bytes/downlink": 2e6, "bytes/ratio": 137.0}, batch_size=1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", self.global_step / 100, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int) -> None: ...


class Terminal(io.StringIO):
    """A terminal that is a string."""

    def isatty(self) -> bool:
        return True

    @property
    def frames(self) -> list[str]:
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())
        return [frame.strip() for frame in re.split(r"[\r\n]+", text) if frame.strip()]

    @property
    def sane(self) -> bool:
        """What is printed next begins a line."""
        return self.getvalue().endswith("\n")


def open_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 130) -> Terminal:
    """Return a terminal that is stderr from now on, where nothing is too quick to be shown."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("fedlight.callbacks.progress._SECONDS", 0.0)
    for name, value in {"COLUMNS": str(columns + 1), "LINES": "30", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    return screen


BATCHES = DataLoader(range(4), batch_size=1)  # type: ignore[arg-type]
ROUNDS = DataLoader(Rounds(), batch_size=None)


def trainer(bar: RoundProgressBar, max_steps: int = 20, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return Trainer(**{**quiet, "max_steps": max_steps, "callbacks": [bar], "log_every_n_steps": 1, "num_sanity_val_steps": 1, **options})


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("Round", "Testing", "Validating", "Predicting"))]


def rounds(shown: list[str]) -> list[int]:
    return [int(number) for line in shown for number in re.findall(r"Round (\d+)", line)]


def test_plain_output_is_a_line_every_tenth_of_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RoundProgressBar(), val_check_interval=10).fit(Federated(), ROUNDS, BATCHES)
    out, err = capsys.readouterr()
    shown = lines(err)
    assert rounds(shown) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert re.fullmatch(r"Round 2/20 · [\d.]+/s · 00:\d\d left · ratio 137x · loss 0.500 · up 2.00 kB · down 2.00 MB", shown[0])
    assert "val acc" not in shown[3]
    assert "val acc 10.0%" in shown[4], "a line waits for the validation that follows its round"
    assert "in all" in shown[-1]
    assert "val acc 20.0%" in shown[-1]
    assert "\x1b" not in err
    assert "Round" not in out, "stdout is left to results"


def test_a_line_says_which_run_and_how_old_its_accuracy_is(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RoundProgressBar(label="no-codec"), max_steps=10, val_check_interval=4).fit(Federated(), ROUNDS, BATCHES)
    shown = [line for line in capsys.readouterr().err.splitlines() if "Round" in line]
    assert all(line.startswith("no-codec · Round ") for line in shown) and len(shown) == 10
    assert ["val acc" in line for line in shown[:4]] == [False, False, False, True]
    assert "val acc 4.0% ·" in shown[3] and "val acc 4.0% after 4 ·" in shown[5] and "val acc 8.0% after 8 ·" in shown[9]


def test_slow_rounds_have_no_more_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The thread of Lightning's bars, which looks at ours too, shows every step of a bar that has not moved for ten seconds."""
    monkeypatch.setattr(Tqdm, "monitor", None)
    monkeypatch.setattr(Tqdm, "monitor_interval", 0.01)
    monkeypatch.setattr(TMonitor, "_test", {"time": lambda: time.time() + 60})
    monkeypatch.setattr(Federated, "on_train_batch_start", lambda *_: time.sleep(0.03), raising=False)
    trainer(RoundProgressBar()).fit(Federated(), ROUNDS)
    assert Tqdm.monitor is not None and Tqdm.monitor.is_alive()
    Tqdm.monitor.exit()
    assert rounds(lines(capsys.readouterr().err)) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]


@pytest.mark.parametrize(("max_steps", "expected"), [(3, [1, 2, 3]), (25, [3, 6, 9, 12, 15, 18, 21, 24, 25])])
def test_plain_lines_when_rounds_do_not_divide_by_ten(max_steps: int, expected: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RoundProgressBar(), max_steps).fit(Federated(), ROUNDS)
    assert rounds(lines(capsys.readouterr().err)) == expected


def test_a_resumed_run_goes_on_from_its_round(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(RoundProgressBar(), 7)
    first.fit(Federated(), ROUNDS)
    first.save_checkpoint(tmp_path / "seven.ckpt")
    capsys.readouterr()
    trainer(RoundProgressBar(), 20).fit(Federated(), ROUNDS, ckpt_path=tmp_path / "seven.ckpt")
    shown = lines(capsys.readouterr().err)
    assert rounds(shown) == [8, 10, 12, 14, 16, 18, 20]
    assert "8/20" in shown[0]


def test_a_resumed_bar_goes_on_from_its_round(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    first = trainer(RoundProgressBar(), 7)
    first.fit(Federated(), ROUNDS)
    first.save_checkpoint(tmp_path / "seven.ckpt")
    terminal.truncate(0)
    trainer(RoundProgressBar(), 20).fit(Federated(), ROUNDS, ckpt_path=tmp_path / "seven.ckpt")
    shown = [frame for frame in terminal.frames if "Round" in frame]
    assert re.search("Round 7/20$", shown[0])
    assert "Round 20/20" in shown[-1]


def test_a_repeated_round_does_not_move_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RoundProgressBar(), 10).fit(Federated(skip=(2, 3, 4)), ROUNDS)
    assert rounds(lines(capsys.readouterr().err)) == list(range(1, 11))


def test_a_run_of_unknown_length_counts_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RoundProgressBar(), -1, max_epochs=-1, max_time={"seconds": 1}).fit(Federated(), ROUNDS)
    shown = lines(capsys.readouterr().err)
    assert rounds(shown)[:-1] == [100 * (i + 1) for i in range(len(shown) - 1)]
    assert "/s" in shown[0]
    assert not any(re.match(r"Round \d+/", line) for line in shown)


def test_the_bar_shows_every_round_and_leaves_the_terminal_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    trainer(RoundProgressBar(), 5, val_check_interval=2).fit(Federated(), ROUNDS, BATCHES)
    assert sorted(set(rounds(terminal.frames))) == [0, 1, 2, 3, 4, 5]
    assert "Round 5/5" in terminal.frames[-1]
    assert "val acc 4.0%" in terminal.frames[-1]
    assert "Sanity" not in terminal.getvalue()
    assert "Validating" not in terminal.getvalue()
    assert terminal.sane


def test_tensors_are_read_no_more_often_than_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    open_terminal(monkeypatch)
    reads = []
    monkeypatch.setattr("fedlight.callbacks.progress._metrics", lambda trainer, _: reads.append(trainer.global_step) or [])
    monkeypatch.setattr("fedlight.callbacks.progress._SECONDS", 1000.0)
    trainer(RoundProgressBar(), 200).fit(Federated(), ROUNDS)
    assert reads == [0, 200], "once when the bar opens, once when training ends"


def test_any_metric_may_be_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Federated, "log_dict", lambda *args, **kwargs: None)
    trainer(RoundProgressBar(), 2).fit(Federated(), ROUNDS)
    shown = lines(capsys.readouterr().err)
    assert re.fullmatch(r"Round 2/2 · [\d.]+/s · 00:\d\d in all", shown[-1])


def test_an_error_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    streams = (sys.stdout, sys.stderr)
    with pytest.raises(ZeroDivisionError):
        trainer(RoundProgressBar()).fit(Federated(fail=ZeroDivisionError()), ROUNDS)
    assert terminal.sane
    assert "Round 3/20" in terminal.frames[-1]
    assert (sys.stdout, sys.stderr) == streams


def test_an_interrupt_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with pytest.raises(SystemExit):
        trainer(RoundProgressBar()).fit(Federated(fail=KeyboardInterrupt()), ROUNDS)
    assert terminal.sane
    assert "Round 3/20" in terminal.frames[-1]


def test_log_records_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("fedlight.test_progress")
    logger.addHandler(handler)

    class Talkative(Federated):
        def training_step(self, batch: int, batch_idx: int) -> None:
            logger.warning("client %d was dropped", batch)
            super().training_step(batch, batch_idx)

    try:
        trainer(RoundProgressBar(), 3).fit(Talkative(), ROUNDS)
    finally:
        logger.removeHandler(handler)
    assert [frame for frame in terminal.frames if "dropped" in frame] == [f"client {i} was dropped" for i in range(3)]
    assert handler.stream is terminal


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_the_other_stages_print_no_lines_without_a_terminal(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(trainer(RoundProgressBar()), stage)(Federated(), BATCHES)
    assert lines(capsys.readouterr().err) == []


@pytest.mark.parametrize(("stage", "name"), [("test", "Testing"), ("validate", "Validation"), ("predict", "Predicting")])
def test_the_other_stages_have_a_bar_of_batches(
    stage: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = open_terminal(monkeypatch)
    getattr(trainer(RoundProgressBar()), stage)(Federated(), BATCHES)
    frames = [frame for frame in terminal.frames if name in frame]
    assert "0/4" in frames[0] and "4/4" in frames[-1]
    assert terminal.sane
    assert "4/4" not in capsys.readouterr().out, "stdout is left to results"


def test_rounds_then_test_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    runner = trainer(RoundProgressBar(), 2)
    runner.fit(Federated(), ROUNDS)
    runner.test(Federated(), BATCHES)
    assert re.search("Testing.* 4/4", terminal.frames[-1])
    assert terminal.sane


def test_a_narrow_terminal_gets_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch, columns=40)
    trainer(RoundProgressBar(), 3).fit(Federated(), ROUNDS)
    assert max(map(len, terminal.frames)) <= 40
    assert terminal.frames[-1].endswith("…")


@pytest.mark.parametrize("switch_off", [lambda: RoundProgressBar(refresh_rate=0), lambda: _disabled(RoundProgressBar())])
def test_it_can_be_switched_off(switch_off, capsys: pytest.CaptureFixture[str]) -> None:
    bar = switch_off()
    assert not bar.is_enabled
    trainer(bar, 3).fit(Federated(), ROUNDS)
    assert lines(capsys.readouterr().err) == []


def _disabled(bar: RoundProgressBar) -> RoundProgressBar:
    bar.disable()
    return bar


def test_it_travels_to_another_process_and_refuses_nonsense() -> None:
    assert pickle.loads(pickle.dumps(RoundProgressBar(5))).refresh_rate == 5
    with pytest.raises(ConfigurationError, match="refresh_rate"):
        RoundProgressBar(-1)
