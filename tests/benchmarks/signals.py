"""SIGTERM and Ctrl-C to runs of two processes: how many hang, how many rounds are lost, and with which status they exit.

Run ``python -m tests.benchmarks.signals --runs 20``. Each run gets its signal at a drawn moment: to the first process, the second, or both.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.integration.test_stopping import endless, rounds, saved_rounds
from tests.processes import Forked, fork_two

PATIENCE = 60.0
"""Seconds after which a run that was told to stop hangs."""

MATRIX = [(number, ranks) for number in (signal.SIGTERM, signal.SIGINT) for ranks in ((0,), (1,), (0, 1))]


@dataclass
class Stopped:
    """What came of runs that were stopped."""

    hangs: int = 0
    lost: int = 0
    codes: Counter[tuple[int | None, ...]] = field(default_factory=Counter)
    longest: float = 0.0


def ended(pair: Sequence[Forked], seconds: float) -> bool:
    """Wait until all processes have ended, at most so long; return whether they have."""
    limit = time.monotonic() + seconds
    while any(process.poll() is None for process in pair) and time.monotonic() < limit:
        time.sleep(0.01)
    return all(process.poll() is not None for process in pair)


def stop(folder: Path, number: signal.Signals, ranks: Sequence[int], draw: random.Random, found: Stopped) -> None:
    """Begin a run, send it the signal, and note what comes of it."""
    pair = fork_two(lambda: endless(folder, "--trainer.devices", "2", "--trainer.strategy", "ddp"), folder)
    first, limit = draw.randint(1, 20), time.monotonic() + 4 * PATIENCE
    while rounds(folder) < first and time.monotonic() < limit and all(process.poll() is None for process in pair):
        time.sleep(0.005)
    time.sleep(draw.random() * 0.1)
    for rank in ranks:
        pair[rank].send(number)
    begin = time.monotonic()
    hangs = not ended(pair, PATIENCE)
    found.longest = max(found.longest, time.monotonic() - begin)
    for process in pair:
        process.send(signal.SIGKILL)
    ended(pair, PATIENCE)
    found.hangs += hangs
    found.codes[tuple(process.code for process in pair)] += 1
    found.lost += rounds(folder) - saved_rounds(folder)


def main() -> None:
    """Stop runs, and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for number, ranks in MATRIX:
        draw, found = random.Random(options.seed), Stopped()
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                stop(Path(folder), number, ranks, draw, found)
        codes = ", ".join(f"{code} in {count}" for code, count in found.codes.most_common())
        print(
            f"{number.name} to rank {' and '.join(map(str, ranks))}: {options.runs} runs, {found.hangs} hang, {found.lost} rounds lost, "
            f"exit {codes}; the longest took {found.longest:.1f} s to end",
            flush=True,
        )


if __name__ == "__main__":
    main()
