"""What a run left behind, read from its folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlight.console.names import did_you_mean
from fedlight.core.errors import ConfigurationError

Points = list[tuple[float, float]]

METRICS_FILE, SUMMARY_FILE, LAYERS_FILE = "metrics.csv", "summary.json", "layers.json"


@dataclass
class RunData:
    """A run's figures."""

    name: str  # what tells it from the others
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)  # the figures of `summary.json`; empty if the run has not ended
    series: dict[str, Points] = field(default_factory=dict)  # points (round, value) by metric; a round is counted from 1
    layers: dict[str, dict[str, float]] = field(default_factory=dict)  # by parameter or matrix, what `layers.json` says of it

    def sent(self) -> Points:
        """Return (round, bytes sent both ways so far)."""
        down = dict(self.series.get("bytes/downlink", []))
        return [(number, up + down.get(number, 0.0)) for number, up in self.series.get("bytes/uplink", [])]

    def over_bytes(self, metric: str) -> Points:
        """Return (bytes sent both ways so far, value) of a metric."""
        sent = self.sent()
        points = []
        for number, value in self.series.get(metric, []):
            before = [n_bytes for at, n_bytes in sent if at <= number]
            if before:
                points.append((before[-1], value))
        return points


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Return the run folders that ``paths`` mean: run folders, or folders with runs somewhere below, in alphabetical order."""
    found: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_file():
            path = path.parent
        if not path.is_dir():
            near = sorted(str(one) for one in path.parent.iterdir() if one.is_dir()) if path.parent.is_dir() else []
            raise ConfigurationError(f"Expected the folder of a run but there is no {path}{did_you_mean(str(path), near)}")
        below = [path] if (path / METRICS_FILE).is_file() else sorted(one.parent for one in path.rglob(METRICS_FILE))
        if not below:
            raise ConfigurationError(f"Expected a run in {path} but there is no {METRICS_FILE} in it or below: name a folder under logs/")
        found += [one for one in below if one not in found]
    return found


def names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that all differ: kind and number of a run, before them its experiment unless all have the same.

    >>> names([Path("logs/digits/transform-35x/0"), Path("logs/digits/no-codec/0")])
    ['transform-35x/0', 'no-codec/0']
    >>> names([Path("logs/mnist/transform-35x/0"), Path("logs/digits/no-codec/0")])
    ['mnist/transform-35x/0', 'digits/no-codec/0']
    """
    whole = [folder.absolute().parts for folder in folders]
    for length in range(2 if one_experiment(folders) else 3, max(map(len, whole)) + 1):
        short = ["/".join(parts[-length:]) for parts in whole]
        if len({*short}) == len(short):
            return short
    return [str(folder) for folder in folders]


def one_experiment(folders: Sequence[Path]) -> str:
    """Return the experiment that several runs are all of, or nothing."""
    found = {"/".join(folder.absolute().parts[-3:-2]) for folder in folders}
    return found.pop() if len(folders) > 1 and len(found) == 1 else ""


def read_run(folder: Path, name: str) -> RunData:
    """Return a run's figures; raises ``ConfigurationError`` if a file is damaged."""
    run = RunData(name, folder)
    try:
        for file, target in ((SUMMARY_FILE, run.summary), (LAYERS_FILE, run.layers)):
            if (folder / file).is_file():
                target.update(json.loads((folder / file).read_text()))
        for row in rows(folder):
            step = int(float(row["step"]))
            for metric, text in row.items():
                if metric not in ("step", "epoch") and text and math.isfinite(value := float(text)):
                    # Evaluations, as after the last round, count the rounds that are done, rounds count from 0.
                    done = metric.startswith(("val", "test")) and run.summary and step == run.summary.get("rounds")
                    number = step if done else step + 1
                    run.series.setdefault(metric, []).append((float(number), value))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"Expected the files of a run but {folder} cannot be read: {error}") from error
    return run


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics; where it goes on from earlier runs, theirs up to the round where the next one begins."""
    found: list[dict[str, str]] = []
    for path in [*sorted(folder.glob("earlier_*.csv")), folder / METRICS_FILE]:
        with path.open(newline="") as file:
            new = list(csv.DictReader(file))
        begin = min((int(float(row["step"])) for row in new), default=math.inf)
        found = [row for row in found if int(float(row["step"])) < begin] + new
    return found
