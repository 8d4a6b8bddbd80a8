"""The report is one file, has every run's figures in it, and says what it cannot read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedlight.core.errors import ConfigurationError
from fedlight.report.command import command
from fedlight.report.read import find_runs, read_run
from fedlight.report.svg import bars, line_chart

SUMMARY = {
    "test_accuracy": 0.91, "val_accuracy": 0.9, "rounds": 4, "clients": 6, "seed": 0, "parameters": 1000, "uplink_bytes_per_client": 100,
    "uplink_bytes": 1200, "downlink_bytes": 24000, "total_bytes": 25200, "codec_bytes": 4000,
    "uplink_ratio": 40.0, "train_seconds": 1.0, "pretrain_seconds": 0.5,
}  # fmt: skip


def write_run(folder: Path, accuracy: float = 0.5, private: bool = False) -> Path:
    folder.mkdir(parents=True)
    rows = [
        "step,bytes/uplink,bytes/downlink,val/accuracy,val/loss,sim/loss,val/client_accuracy_mean,val/client_accuracy_worst,privacy/epsilon"
    ]
    for step in range(4):
        rows.append(f"{step},{300 * (step + 1)},{6000 * (step + 1)},,,{2.0 - step / 4},,,{0.1 * (step + 1) if private else ''}")
    rows += [f"{step},,,{accuracy + step / 100},{1 - step / 10},,{accuracy},{accuracy / 2}," for step in (1, 4)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "layers.json").write_text(
        json.dumps({"0.weight": {"numbers": 64, "energy_kept": 0.75, "bits": 320}, "0.bias": {"numbers": 4}})
    )
    (folder / "config.yaml").write_text("experiment: x\n")
    return folder


class Links(HTMLParser):
    """Collects what a page loads from elsewhere, and its unclosed tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.outside += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag in ("script", "link", "iframe", "img"):
            self.outside.append(tag)
        if tag not in ("meta", "circle", "line", "polyline", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in ("circle", "line", "polyline", "rect"):
            assert self.open.pop() == tag


@pytest.fixture
def written(tmp_path, capsys) -> str:
    for name, accuracy in (("transform-35x", 0.8), ("no-codec", 0.85)):
        write_run(tmp_path / "logs" / "digits" / name / "0", accuracy)
    command([str(tmp_path / "logs"), "--output", str(tmp_path / "out" / "mine.html"), "--title", "Mine & yours"])
    assert "2 runs" in capsys.readouterr().out
    return (tmp_path / "out" / "mine.html").read_text()


def test_it_is_one_file_that_loads_nothing(written):
    page = Links(written)
    assert page.outside == [] and page.open == []
    assert "url(" not in written and "@import" not in written and "http" not in written.replace("http-equiv", "")
    assert "Mine &amp; yours" in written


def test_every_run_has_its_curves_and_figures(written):
    for name in ("transform-35x/0", "no-codec/0"):
        assert f"</i>{name}</li>" in written and f"<th>{name}</th>" in written
    for heading in (
        "Accuracy by rounds",
        "Accuracy by bytes",
        "Worst tenth of clients",
        "In the whole run",
        "Energy kept by layer",
        "Bits by layer",
    ):
        assert heading in written
    assert "<td>25.2 kB</td>" in written, "the total of both directions"
    assert "Epsilon spent" not in written


def test_bytes_and_rounds_of_an_evaluation(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    assert run.series["val/accuracy"] == [(2.0, 0.51), (4.0, 0.54)]
    assert run.over_bytes("val/accuracy") == [(2 * 6300, 0.51), (4 * 6300, 0.54)]


def test_epsilon_is_drawn_where_it_is_spent(tmp_path):
    command([str(write_run(tmp_path / "run", private=True)), "--output", str(tmp_path / "report.html")])
    assert "Epsilon spent" in (tmp_path / "report.html").read_text()


def test_a_run_that_has_not_ended_is_shown_and_said_to_be(tmp_path):
    run = write_run(tmp_path / "runs" / "cut")
    (run / "summary.json").unlink()
    command([str(run), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert "/runs/cut.</p>" in text and "Not finished, so without a summary" in text and "Accuracy by rounds" in text


def test_a_metric_of_the_user_is_drawn_by_rounds_and_by_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [line.replace("val/accuracy", "val_f1") for line in (run / "metrics.csv").read_text().splitlines()]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    command([str(run), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert "val_f1 by rounds" in text and "val_f1 by bytes" in text and "Accuracy by rounds" not in text
    assert read_run(run, "run").over_bytes("val_f1") == [(2 * 6300, 0.51), (4 * 6300, 0.54)]


def test_runs_of_two_experiments_are_told_apart(tmp_path):
    for experiment, kind in (("digits", "transform"), ("mnist", "none")):
        write_run(tmp_path / experiment / kind / "0")
    page = tmp_path / "report.html"
    command([str(tmp_path), "--output", str(page)])
    assert "digits/transform/0" in page.read_text() and "<h1>2 runs</h1>" in page.read_text()
    write_run(tmp_path / "mnist" / "transform" / "0")
    command([str(tmp_path / "mnist"), "--output", str(page)])
    assert "<h1>2 runs of mnist</h1>" in page.read_text() and "mnist/transform/0</li>" not in page.read_text()


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "logs" / "empty").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="did you mean .*logs"):
        find_runs([str(tmp_path / "lgs")])
    with pytest.raises(ConfigurationError, match=r"no metrics\.csv"):
        find_runs([str(tmp_path / "logs")])
    broken = write_run(tmp_path / "broken")
    (broken / "summary.json").write_text("{")
    with pytest.raises(ConfigurationError, match="broken cannot be read"):
        command([str(broken), "--output", str(tmp_path / "report.html")])


def test_charts_stay_within_their_frame():
    chart = line_chart([("one", [(0, 0.0), (50, 2.0), (100, 1.0)]), ("flat", [(0, 1.0)]), ("none", [])], "x", "y")
    points = [tuple(map(float, pair.split(","))) for line in re.findall(r'points="([^"]*)"', chart) for pair in line.split()]
    assert len(points) == 4 and all(62 <= x <= 506 and 14 <= y <= 256 for x, y in points)
    assert line_chart([("none", [])], "x", "y") == "" and bars([("none", [])], str) == ""
    assert line_chart([("<b>", [(0, 1.0), (1, 2.0)])], "x", "y").count("<b>") == 0


def test_a_resumed_run_has_the_rows_of_the_run_before_it(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "earlier_0.csv").write_text((run / "metrics.csv").read_text())
    (run / "metrics.csv").write_text("step,bytes/uplink,bytes/downlink,val/accuracy\n2,900,18000,\n3,1200,24000,\n4,,,0.7\n")
    read = read_run(run, "run")
    assert read.series["bytes/uplink"] == [(1.0, 300), (2.0, 600), (3.0, 900), (4.0, 1200)]
    assert read.series["val/accuracy"] == [(2.0, 0.51), (4.0, 0.7)]
