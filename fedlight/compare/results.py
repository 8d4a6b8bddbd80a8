"""The results of a comparison: a row for each codec, from the summaries and `metrics.csv` of its runs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from fedlight.compare.execute import Outcome
from fedlight.metrics import format_bytes

Row = dict[str, Any]

METRICS_FILE = "metrics.csv"
_MEANS = ("uplink_bytes", "downlink_bytes", "codec_bytes", "encoder_bytes", "total_bytes")
_SECONDS = ("pretrain_seconds", "train_seconds")


def paired_gap(reference: Mapping[int, float], other: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Return mean and half-width of the 95 % t interval of ``reference - other``, over the seeds that both have.

    The mean is None without a common seed, the half-width with fewer than two. Pairing cancels the effect of the seed on both.

    >>> gap, half = paired_gap({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.5, 1: 1.0, 2: 1.5})
    >>> round(gap, 3), round(half, 3)
    (1.0, 1.242)
    """
    differences = [reference[seed] - other[seed] for seed in sorted(set(reference) & set(other))]
    if not differences:
        return None, None
    count = len(differences)
    half = float(stats.t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count) if count > 1 else None
    return fmean(differences), half


def reach_target(folder: Path, target: float) -> tuple[float, float]:
    """Return (bytes both ways, rounds) when a run's validation accuracy first reached ``target``; infinity if it never did."""
    sent: dict[int, float] = {}
    reached: list[int] = []
    with (folder / METRICS_FILE).open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("bytes/uplink"):
                sent[int(row["step"])] = float(row["bytes/uplink"]) + float(row["bytes/downlink"])
            if row.get("val/accuracy") and float(row["val/accuracy"]) >= target:
                reached.append(int(row["step"]))
    if not reached:
        return math.inf, math.inf
    return max((n_bytes for step, n_bytes in sent.items() if step <= min(reached)), default=0.0), min(reached) + 1


def first_loss(folder: Path) -> float | None:
    """Return the clients' mean loss in a run's first round, before the first decoded update; None if it was not logged."""
    with (folder / METRICS_FILE).open(newline="") as file:
        return next((float(row["sim/loss"]) for row in csv.DictReader(file) if row.get("sim/loss")), None)


def unequal_starts(
    outcomes: Iterable[Outcome], training: Callable[[str], str] = lambda codec: ""
) -> list[tuple[int, dict[float, list[str]]]]:
    """Return each seed whose runs had different losses in the first round, and the codecs by that loss.

    The same seed gives every codec the same weights, partition, cohort and batches, so the loss is the same for all entries with equal
    training settings; ``training`` maps an entry to those.
    """
    losses: dict[tuple[int, str], dict[float, list[str]]] = {}
    for outcome in outcomes:
        if (loss := first_loss(outcome.folder)) is not None:
            names = losses.setdefault((outcome.run.seed, training(outcome.run.codec)), {}).setdefault(loss, [])
            if outcome.run.codec not in names:
                names.append(outcome.run.codec)
    return [(seed, by_loss) for (seed, _), by_loss in losses.items() if len(by_loss) > 1]


def make_row(codec: str, outcomes: Sequence[Outcome], reference: Sequence[Outcome], target: float | None) -> Row:
    """Return the metrics of a codec's runs at the chosen rate: accuracies of the last round's model as fractions, bytes per run.

    ``gap_points`` is the gap to the reference in percentage points, paired over seeds, positive if the codec is worse; ``bytes_to_target``
    and ``rounds_to_target`` are medians over seeds, where a run that never reaches the target counts as infinity.
    """
    summaries = [outcome.summary for outcome in outcomes]
    accuracies = [summary["test_accuracy"] for summary in summaries]
    points = [{o.run.seed: 100 * o.summary["test_accuracy"] for o in group} for group in (reference, outcomes)]
    gap, half = paired_gap(*points)
    reached = [reach_target(outcome.folder, target) for outcome in outcomes] if target is not None else []
    to_target = [_finite(median(values)) for values in zip(*reached, strict=True)] or [None, None]
    row = {
        "codec": codec,
        "uplink_ratio": fmean(summary["uplink_ratio"] for summary in summaries),
        "accuracy_mean": fmean(accuracies),
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
        "gap_points": gap,
        "gap_ci95": half,
        **{key: fmean(summary[key] for summary in summaries) for key in _MEANS},
        "bytes_to_target": to_target[0],
        "rounds_to_target": to_target[1],
        "server_lr": outcomes[0].run.lr,
        "seeds": sorted(outcome.run.seed for outcome in outcomes),
        "additive": summaries[0]["additive"],
    }
    return row | {key: fmean(summary[key] for summary in summaries) for key in _SECONDS}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_rows(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``compare.json`` and ``compare.csv``, and return their paths; an empty cell means that the metric does not exist."""
    table, text = folder / "compare.csv", folder / "compare.json"
    text.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "seeds": " ".join(map(str, row["seeds"]))} for row in rows)
    return [text, table]


def show_rows(rows: Sequence[Row], title: str, reference: str, target: float | None) -> Table:
    """Return the rows as a table for the terminal, with the columns that fit in 80 characters; downlink is total minus uplink."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("codec", overflow="fold", min_width=8)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("accuracy, %", justify="right", min_width=9)  # wraps into two lines in a narrow terminal
    table.add_column("gap, points", justify="right", min_width=7)
    for name in ("uplink", "encoders", "total", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    if target is not None:
        table.add_column(f"to {100 * target:g} %", justify="right", no_wrap=True)
    for row in rows:
        accuracy, spread = 100 * row["accuracy_mean"], row["accuracy_std"]
        gap, half = row["gap_points"], row["gap_ci95"]
        sent = (row[key] for key in ("uplink_bytes", "codec_bytes", "total_bytes"))
        cells = [
            row["codec"],
            f"{row['uplink_ratio']:.1f}x",
            f"{accuracy:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}"),
            "" if gap is None or row["codec"] == reference else f"{gap:+.2f}" + ("" if half is None else f" ± {half:.2f}"),
            *(format_bytes(n_bytes) for n_bytes in sent),
            f"{row['server_lr']:g}",
        ]
        if target is not None:
            reached = row["bytes_to_target"]
            cells.append("never" if reached is None else format_bytes(reached))
        table.add_row(*cells)
    return table
