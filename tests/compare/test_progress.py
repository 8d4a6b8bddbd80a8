from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedlight.compare import progress
from fedlight.compare.execute import Outcome
from fedlight.compare.plan import Run
from fedlight.compare.progress import RunProgress


def outcome(seed: int, **changes) -> Outcome:
    return Outcome(Run("mine", seed, 1.25), **{"folder": Path("there"), "summary": {"test_accuracy": 0.915}, "seconds": 12.0} | changes)


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, *outcomes: Outcome) -> str:
    file = StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=file, force_terminal=terminal, width=60, color_system=None))
    with RunProgress(3) as bar:
        for one in outcomes:
            bar.show(one)
        bar.expect_fewer(1)
    return file.getvalue()


def test_without_a_terminal_every_run_is_a_line(monkeypatch, capsys):
    assert shown(monkeypatch, False, outcome(0, again=True), outcome(1), outcome(2, error="ValueError: no")) == ""
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Run 1/3 · mine, seed 0, rate 1.25: 91.5%, finished before", "no rate to foretell the rest from"
    assert lines[1].startswith("Run 2/3 · mine, seed 1, rate 1.25: 91.5% in 12 s · 0:00:0") and lines[1].endswith(" left")
    assert lines[2:] == ["Run 3/3 · mine, seed 2, rate 1.25: failed: ValueError: no"]


def test_on_a_terminal_there_is_a_bar_and_a_line_for_each_failure(monkeypatch):
    text = shown(monkeypatch, True, outcome(0), outcome(1, error="ValueError: no"))
    assert "Run 2/3" in text and "\nmine, seed 1, rate 1.25: failed: ValueError: no" in text.replace("\r", "\n").replace("\x1b[2K", "")
    assert "…" in text, "a bar is one line"
