"""Throughput and memory of fedlight and the cost of its codecs, side by side with a bare PyTorch loop on this machine: `make bench`.

Every figure to compare is a ratio: two systems do the same rounds in turn, in one process. Absolute rates only go with the
machine that is named beside them. On a machine that others use too, `--threads 1` keeps them from stalling torch's threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import coding
import masking
import side_by_side
import throughput
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BENCHMARKS = ("b1", "b2", *side_by_side.NAMES, "memory", "b5", "b6")
COHORTS = (10, 100, 1000, 10_000)
NEEDED = {"b1": 0.7, "b2": 0.9}  # of the bare loop's rounds per second
NEEDED_MEMORY = 1.1  # of the small cohort's peak
NEEDED_CODING = 0.1  # of the clients' training
NEEDED_FIT = 60.0  # seconds

METHOD = (
    "B1, B2: 400 clients of 50 samples, cohort 50, batch 10, one local epoch, SGD 0.1; fedlight with the identity codec, every message "
    "serialised, under the Trainer, loggers and callbacks of `fedlight fit` (progress bar on a pseudo-terminal, TensorBoard and CSV each "
    "round, a checkpoint every 10 rounds or once a repeat), without comparing with the true aggregate (sim_every 0), without validation.",
    "The bare loop does the same client steps in the same batch orders (drawn before its clock starts) and the mean; it sends no messages, "
    "adds up no losses, checks and logs nothing. Weights are checked to agree after a round.",
    "The two take turns within a run; a repeat's ratio is that of their summed seconds; medians of the repeats after a warm-up run.",
    *side_by_side.METHOD,
    "Memory: 10,000 clients, peak resident memory of a process of its own.",
    "B5: each client trains, its update is copied, encoded, quantised and packed, then unpacked and summed, by one codec after the other; "
    "the server decodes once. `of training` is all of the codec's part of a round over all of the clients' training in it. Seconds of a "
    "client are medians over clients; small updates are copied within the cache. Repeats alternate between fits and rounds; the encoder's "
    "size is that of its exported file.",
    "B6: all parties of a secure aggregation in turn, in one process, transport aside. A client's seconds are those of all its stages, "
    "median over those who sent a code; `masks` is the part that goes with the vector's length (masks of the cohort, packing), for a code "
    "and for the uncompressed update at 16 bits; bytes are one client's: its masked message, and keys, shares and signatures beside it.",
)


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("fedlight", "torch", "lightning")},
    }


def cpu_model() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def measure_memory(repeats: int, threads: int) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each size of cohort, each run in processes of its own, and a line on the data."""
    rows, smallest, result = [], 0.0, {}
    for cohort in COHORTS:
        peaks = []
        for _ in range(repeats):
            command = [sys.executable, str(HERE / "memory.py"), "--cohort", str(cohort), "--threads", str(threads)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            peaks.append(result["peak_rss_mb"])
        peak = statistics.median(peaks)
        smallest = smallest or peak
        rows.append(
            {
                "benchmark": "memory",
                "system": f"fedlight, cohort of {cohort:,}",
                "client_steps_per_second": None,
                "rounds_per_second": None,
                "ratio_to_bare": None,
                "peak_rss_mb": peak,
                "ratio_to_smallest_cohort": peak / smallest,
                "runs": peaks,
            }
        )
    return rows, f"memory: {result['data']}; keeping every update of the largest cohort would take {result['cohort_mb']:,.0f} MB more"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Say of every target whether it was met."""
    lines = []
    for name, needed in NEEDED.items():
        for row in rows:
            if row["benchmark"] == throughput.WORKLOADS[name].title and row["system"] == "fedlight":
                ratio = row["ratio_to_bare"]
                lines.append(f"{row['benchmark']}: {ratio:.0%} of the bare loop, wanted {needed:.0%}: {_met(ratio >= needed)}")
    lines += side_by_side.verdicts(rows)
    ratios = [row["ratio_to_smallest_cohort"] for row in rows if row["benchmark"] == "memory"]
    if ratios:
        lines.append(f"memory: {max(ratios):.3f} times the smallest cohort's, wanted {NEEDED_MEMORY}: {_met(max(ratios) <= NEEDED_MEMORY)}")
    for row in rows:
        if "share_of_round" in row:
            what, share, fit = f"{row['benchmark']}, {row['system']}", row["share_of_round"], row["fit_seconds"]
            lines.append(f"{what}: {share:.1%} of the training, wanted {NEEDED_CODING:.0%}: {_met(share <= NEEDED_CODING)}")
            lines.append(f"{what}: fitted in {fit:.1f} s, wanted {NEEDED_FIT:.0f} s: {_met(fit <= NEEDED_FIT)}")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "NOT met"


COLUMNS = ("benchmark", "system", "client steps/s", "rounds/s", "of bare", "peak MB", "runs")


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as text."""

    def show(key: str, form: str) -> str:
        return "" if row[key] is None else form.format(row[key])

    figures = [show("client_steps_per_second", "{:,.0f}"), show("rounds_per_second", "{:.2f}"), show("ratio_to_bare", "{:.2f}")]
    runs = " ".join(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in row["runs"])
    return [row["benchmark"], row["system"], *figures, show("peak_rss_mb", "{:,.0f}"), runs]


def tables(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """Return (columns, lines of text): one table of speed and memory, one of codecs, one of masks, each if there is anything to show."""
    codecs = [coding.cells(row) for row in rows if "share_of_round" in row]
    masks = [masking.cells(row) for row in rows if "vector_seconds" in row]
    others = [cells(row) for row in rows if not {"share_of_round", "vector_seconds"} & set(row)]
    return [table for table in ((COLUMNS, others), (coding.COLUMNS, codecs), (masking.COLUMNS, masks)) if table[1]]


def write(folder: Path, rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Write `benchmarks.json` (the rows) and `benchmarks.md` (the same as tables, with machine and method)."""
    folder.mkdir(parents=True, exist_ok=True)
    here = machine()
    (folder / "benchmarks.json").write_text(json.dumps([row | {"machine": here} for row in rows], indent=2) + "\n")
    lines = ["# Benchmarks", "", ", ".join(f"{name}: {value}" for name, value in here.items()), ""]
    for columns, texts in tables(rows):
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(text) + " |" for text in texts] + [""]
    lines += [f"- {line}" for line in [*verdicts(rows), *notes, *METHOD]]
    (folder / "benchmarks.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run what was asked for, show it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help=f"comma-separated, of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of which the median is taken (default: 3)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: torch's own choice, as in `fedlight fit`)")
    parser.add_argument("--systems", default="", help="of b1peers and b2peers, titles separated by semicolons (default: all)")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmarks"), help="folder of benchmarks.json and benchmarks.md")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",")]
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"--only: expected some of {', '.join(BENCHMARKS)} but got {', '.join(unknown)}")
    if arguments.repeats < 1 or arguments.threads < 0:
        parser.error(f"expected --repeats >= 1 and --threads >= 0 but got {arguments.repeats} and {arguments.threads}")
    try:
        systems = side_by_side.chosen(arguments.systems)
    except ValueError as error:
        parser.error(f"--systems: {error}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for name in names:
        console.print(f"running {name} ...")
        if name == "memory":
            found, note = measure_memory(arguments.repeats, arguments.threads)
        elif name in side_by_side.NAMES:
            found, note = side_by_side.measure(side_by_side.NAMES[name], arguments.repeats, systems)
        elif name == "b5":
            found, note = coding.measure(arguments.repeats)
        elif name == "b6":
            found, note = masking.measure(arguments.repeats)
        else:
            found, note = throughput.measure(name, arguments.repeats)
        rows += found
        notes.append(note)
    for columns, texts in tables(rows):
        shown = [k for k, column in enumerate(columns) if columns is not coding.COLUMNS or column in coding.SHORT]
        caption = ", ".join(f"{key} {value}" for key, value in machine().items())
        table = Table(*(columns[k] for k in shown), title="Benchmarks", caption=caption)
        for text in texts:
            table.add_row(*(text[k] for k in shown))
        console.print(table)
    for line in [*verdicts(rows), *notes]:
        console.print(line, soft_wrap=True)
    write(arguments.output, rows, notes)
    console.print(f"Written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
