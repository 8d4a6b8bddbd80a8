from __future__ import annotations

import csv
import json
import math
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from fedlight.compare.execute import Outcome
from fedlight.compare.plan import Run
from fedlight.compare.results import first_loss, make_row, paired_gap, reach_target, show_rows, unequal_starts, write_rows

HEADER = ["step", "bytes/uplink", "bytes/downlink", "val/accuracy", "sim/loss"]


def outcome(folder, codec="mine", seed=0, accuracy=0.9, lr=1.0, rows=(), **changes) -> Outcome:
    folder = folder / f"{codec}_{seed}_{lr}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([HEADER, *rows])
    summary = {
        "test_accuracy": accuracy,
        "uplink_ratio": 8.0,
        "uplink_bytes": 100,
        "downlink_bytes": 1000 + seed,
        "total_bytes": 1100 + seed,
        "codec_bytes": 50,
        "encoder_bytes": 25,
        "additive": True,
        "pretrain_seconds": 1.0,
        "train_seconds": 2.0,
    }
    return Outcome(Run(codec, seed, lr), folder, summary | changes)


# -- statistics --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8))
def test_the_gap_is_scipy_s_paired_t_interval(pairs):
    first, second = np.array(pairs).T
    gap, half = paired_gap(dict(enumerate(first)), dict(enumerate(second)))
    assert gap == pytest.approx(np.mean(first - second), abs=1e-9)
    if np.std(first - second) > 1e-9:
        low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert (gap - half, gap + half) == pytest.approx((low, high), abs=1e-6)


def test_pairing_takes_out_what_the_seed_does():
    _, half = paired_gap({0: 90.0, 1: 80.0, 2: 70.0}, {0: 89.0, 1: 79.0, 2: 69.0})
    assert half == pytest.approx(0)


def test_only_common_seeds_are_paired():
    assert paired_gap({0: 3.0, 1: 5.0}, {1: 4.0, 2: 9.0}) == (1.0, None)
    assert paired_gap({0: 3.0}, {1: 4.0}) == (None, None)


# -- metrics.csv -------------------------------------------------------------------------------------------------------

ROWS = [
    (0, 10, 100, "", 2.5),
    (1, "", "", 0.5, ""),  # the order of rows of one step does not matter
    (1, 20, 200, "", 2.0),
    (2, 30, 300, "", 1.5),
    (3, 40, 400, "", 1.0),
    (3, "", "", 0.8, ""),
    (5, 60, 600, "", 1.0),
    (5, "", "", 0.7, ""),
]


@pytest.mark.parametrize(("target", "expected"), [(0.5, (220, 2)), (0.6, (440, 4)), (0.8, (440, 4)), (0.81, (math.inf, math.inf))], ids=str)
def test_the_target_is_reached_at_the_first_validation_above_it(target, expected, tmp_path):
    assert reach_target(outcome(tmp_path, rows=ROWS).folder, target) == expected


def test_bytes_to_target_is_the_median_over_seeds_and_null_if_most_never_get_there(tmp_path):
    slow = [(9, 90, 900, "", 1), (9, "", "", 0.8, "")]
    runs = [outcome(tmp_path, seed=0, rows=ROWS), outcome(tmp_path, seed=1, rows=slow), outcome(tmp_path, seed=2, rows=ROWS[:3])]
    row = make_row("mine", runs, runs, 0.8)
    assert (row["bytes_to_target"], row["rounds_to_target"]) == (990, 10)
    row = make_row("mine", runs[1:], runs, 0.8)
    assert row["bytes_to_target"] is None and row["rounds_to_target"] is None
    assert make_row("mine", runs, runs, None)["bytes_to_target"] is None


def test_runs_of_a_seed_that_did_not_start_alike_are_named(tmp_path):
    alike = [outcome(tmp_path, codec, rows=ROWS) for codec in ("a", "b")]
    assert first_loss(alike[0].folder) == 2.5
    assert unequal_starts(alike) == []
    other = outcome(tmp_path, "c", rows=[(0, 10, 100, "", 2.6)])
    assert unequal_starts([*alike, other]) == [(0, {2.5: ["a", "b"], 2.6: ["c"]})]
    assert unequal_starts([*alike, other], lambda codec: "another algorithm" if codec == "c" else "") == []
    assert unequal_starts([alike[0], outcome(tmp_path, "c", seed=1, rows=[(0, 10, 100, "", 2.6)])]) == []


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_has_every_promised_figure(tmp_path):
    reference = [outcome(tmp_path, "none", seed, accuracy) for seed, accuracy in enumerate((0.95, 0.96, 0.98))]
    runs = [outcome(tmp_path, "mine", seed, accuracy, lr=1.5) for seed, accuracy in enumerate((0.94, 0.95, 0.96))]
    row = make_row("mine", runs, reference, None)
    promised = "codec uplink_ratio accuracy_mean accuracy_std gap_points gap_ci95 uplink_bytes downlink_bytes codec_bytes encoder_bytes"
    more = "total_bytes bytes_to_target rounds_to_target server_lr seeds additive pretrain_seconds train_seconds"
    assert list(row) == [*promised.split(), *more.split()]
    assert row["accuracy_mean"] == pytest.approx(0.95) and row["accuracy_std"] == pytest.approx(0.01)
    assert row["gap_points"] == pytest.approx(4 / 3), "worse is positive"
    assert row["total_bytes"] == row["uplink_bytes"] + row["downlink_bytes"] == 1101
    assert (row["server_lr"], row["seeds"], row["additive"]) == (1.5, [0, 1, 2], True)


def test_one_seed_has_no_spread(tmp_path):
    run = outcome(tmp_path)
    row = make_row("mine", [run], [], None)
    assert row["accuracy_std"] is None and row["gap_points"] is None and row["gap_ci95"] is None


def test_files_hold_the_same_rows(tmp_path):
    runs = {codec: [outcome(tmp_path, codec, seed, 0.9 + seed / 100) for seed in (0, 1)] for codec in ("none", "mine")}
    rows = [make_row(codec, group, runs["none"], None) for codec, group in runs.items()]
    text, table = write_rows(rows, tmp_path)
    assert json.loads(text.read_text()) == rows
    with table.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == list(rows[0]) and cells[1]["seeds"] == "0 1" and cells[1]["bytes_to_target"] == ""
    assert float(cells[1]["accuracy_mean"]) == rows[1]["accuracy_mean"]


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_shows_numbers_in_full(width, tmp_path):
    runs = [outcome(tmp_path, "mine", seed, 0.9 + seed / 100) for seed in (0, 1)]
    rows = [make_row("mine", runs, runs, None), make_row("another codec", runs, runs, None)]
    console = Console(width=width, file=StringIO())
    console.print(show_rows(rows, "title", "mine", 0.95))
    printed = console.file.getvalue()
    assert all(part in printed for part in ("90.50", "0.71", "+0.00", "1.10 kB", "to 95 %", "never")) and "…" not in printed, printed
