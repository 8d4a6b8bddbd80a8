"""Long work is never silent: where there is no terminal, a line comes at least every few seconds."""

from __future__ import annotations

import time
from io import StringIO

import pytest
import rich.console
from rich.console import Console

from fedlight.core.progress import Lines, heartbeat, progress, waiting


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_step_that_takes_long_is_told_of_while_it_runs(capsys):
    with progress("Recording", total=3, seconds=0.05) as advance:
        advance()
        time.sleep(0.25)
    said = lines(capsys)
    assert len(said) >= 2 and all(line.startswith("Recording 1/3: 0:00:0") and line.endswith("left") for line in said)


def test_quick_work_says_nothing_and_so_does_what_is_not_to_be_shown(capsys):
    with progress("Recording", total=3) as advance:
        advance()
    with progress("Recording", show=False, seconds=0.01) as advance:
        time.sleep(0.1)
        advance()
    assert lines(capsys) == []


def test_what_is_said_comes_at_once_with_the_count_and_the_time_that_is_left(capsys):
    with progress("Run", total=4) as advance:
        advance("one: finished before", timed=False)
        advance("two: 91.5 %")
        advance("three: failed")
        advance("three: failed", done=0)
    said = lines(capsys)
    assert said[0] == "Run 1/4 · one: finished before", "nothing to foretell the rest from"
    assert said[1].startswith("Run 2/4 · two: 91.5 % · 0:00:0") and said[1].endswith(" left")
    assert len(said) == 3, "the same is not said twice"


def test_on_a_terminal_there_is_a_bar_of_one_line(monkeypatch):
    file = StringIO()
    monkeypatch.setattr(rich.console, "Console", lambda stderr: Console(file=file, force_terminal=True, width=60, color_system=None))
    monkeypatch.setattr("fedlight.core.progress.is_terminal", lambda stream: True)
    with progress("Run", total=3) as advance:
        advance("one")
        advance("two: " + 90 * "o")
    assert "Run 2/3" in file.getvalue() and "…" in file.getvalue()


def test_a_line_of_another_kind_puts_the_next_one_off(capsys):
    talk = Lines(seconds=0.4)
    with heartbeat(talk, lambda: "still here"):
        for _ in range(4):
            time.sleep(0.1)
            talk.say("news")
    assert lines(capsys) == ["news"] * 4


def test_the_thread_ends_with_the_block_and_errors_pass(capsys):
    with pytest.raises(ValueError, match="mine"), progress("Fitting", seconds=0.05):
        raise ValueError("mine")
    time.sleep(0.15)
    assert lines(capsys) == []


def test_what_is_waited_for_is_told_at_once_and_again(capsys):
    with waiting("Waiting for the nodes", seconds=0.8) as talk:
        for _ in range(12):
            time.sleep(0.1)
            talk.heard()
        assert lines(capsys) == ["Waiting for the nodes ..."]
        time.sleep(1.5)
    assert lines(capsys)[0].startswith("Waiting for the nodes: 0:00:0")
