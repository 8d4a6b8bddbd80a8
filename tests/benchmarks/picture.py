"""Accuracy against bytes: one curve a kind of run, the band spans its seeds. Needs matplotlib (the `dev` extra).

    python tests/benchmarks/picture.py OUTPUT.png "with a code=logs/mnist/transform-64x/0" "without a codec=logs/mnist/no-codec/0" ...

Runs of the same name are seeds of one curve. Reads the `metrics.csv` that every run leaves behind.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ticker import ScalarFormatter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by everyone
MARKS = ("o", "s", "^", "D")


def curve(folder: Path, direction: str) -> list[tuple[float, float]]:
    """Return (bytes so far, validation accuracy in per cent) of a run, one point a validation."""
    points, sent = [], 0.0
    with (folder / "metrics.csv").open() as file:
        for row in sorted(csv.DictReader(file), key=lambda row: int(row["step"])):
            if row.get("bytes/uplink"):
                sent = float(row["bytes/uplink"]) + (float(row["bytes/downlink"]) if direction == "total" else 0)
            if row.get("val/accuracy") and sent:
                points.append((sent, 100 * float(row["val/accuracy"])))
    return points


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    runs: dict[str, list[Path]] = defaultdict(list)
    for item in arguments.runs:
        name, _, folder = item.partition("=")
        runs[name].append(Path(folder))
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True)
    for panel, direction in zip(panels, ("uplink", "total"), strict=True):
        for (name, folders), colour, mark in zip(runs.items(), COLOURS, MARKS, strict=False):
            curves = np.array([curve(folder, direction) for folder in folders])
            sent, accuracy = curves[..., 0].mean(0), curves[..., 1]
            panel.plot(sent / 1e6, accuracy.mean(0), color=colour, marker=mark, markersize=4, label=name)
            panel.fill_between(sent / 1e6, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.2, linewidth=0)
        panel.set_xscale("log")
        panel.set_xlabel("sent by clients (MB)" if direction == "uplink" else "both ways, encoders included (MB)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy (%)")
    panels[0].xaxis.set_major_formatter(ScalarFormatter())
    panels[1].legend(loc="lower left", frameon=False)
    figure.suptitle(arguments.title)
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
