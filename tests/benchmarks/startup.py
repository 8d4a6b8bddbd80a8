"""Start-up: seconds from typing a command to its help or its first round, and to set up 100,000 clients. Prints a markdown table.

Processor seconds (of all threads) beside seconds on the clock, which say little on a machine that others use too.

python tests/benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CLIENTS, SAMPLES = 100_000, 1_000_000
ROOT = Path(__file__).parents[2]
MARK = "START-UP "

FIRST_ROUND = f"""
import json, sys, time
from fedlight.cli import main
from fedlight.modules import FederatedModule

def report(self, batch, batch_idx):
    print({MARK!r} + json.dumps([time.process_time(), time.time()]), flush=True)
    sys.exit()

FederatedModule.training_step = report
main(["fit", "--config", "configs/digits.yaml", "--trainer.default_root_dir", sys.argv[1]])
"""

POPULATION = f"""
import json, time
import numpy as np, torch
from fedlight.data import {{partitioner}}, DataSource, FederatedDataModule, Uniform, build_arrays

class Source(DataSource):
    def load(self, root):
        return arrays

x, y = np.zeros(({SAMPLES}, 4), dtype=np.float32), np.random.default_rng(0).integers(0, 10, {SAMPLES})
arrays = build_arrays(x, y, x[:100], y[:100], 10, source="random labels")
data = FederatedDataModule(Source(), {{partitioner}}(), num_clients={CLIENTS}, sampler=Uniform(100), client_holdout=0.2)
before = time.process_time(), time.time()
data.setup()
data.cohort(0)
print({MARK!r} + json.dumps([time.process_time() - before[0], time.time() - before[1]]))
"""

COMMAND = "import sys; from fedlight.usage import main; sys.argv = ['fedlight', *{!r}]; main()"

STEPS = {
    "import torch": "import torch",
    "import lightning.pytorch.cli": "import lightning.pytorch.cli",
    "import fedlight.cli": "import fedlight.cli",
    "fedlight --help": COMMAND.format(["--help"]),
    "fedlight fit --help": COMMAND.format(["fit", "--help"]),
    "fedlight fit --config digits --print_config": COMMAND.format(["fit", "--config", "digits", "--print_config"]),
    "fedlight fit --config configs/digits.yaml, to the first round": FIRST_ROUND,
    f"set-up of {CLIENTS:,} clients, {SAMPLES:,} samples: IID": POPULATION.format(partitioner="IID"),
    f"set-up of {CLIENTS:,} clients, {SAMPLES:,} samples: Dirichlet": POPULATION.format(partitioner="Dirichlet"),
}


def measure(code: str) -> tuple[float, float]:
    """Return the processor seconds and the seconds on the clock of a new interpreter that runs ``code``, or of what it reports itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        begun, before = time.time(), os.times()
        command = [sys.executable, "-c", code, folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        after, ended = os.times(), time.time()
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            cpu, clock = json.loads(line.removeprefix(MARK))
            return cpu, clock - begun if code == FIRST_ROUND else clock
    return sum(after[2:4]) - sum(before[2:4]), ended - begun


def main() -> None:
    """Measure every step several times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of which medians are taken, after one that warms the disk's cache")
    arguments = parser.parse_args()
    rows: list[list[Any]] = [["step", "processor, s", "clock, s"], ["---"] * 3]
    for name, code in STEPS.items():
        runs = [measure(code) for _ in range(arguments.repeats + 1)][1:]
        rows.append([name, *(f"{statistics.median(each):.2f}" for each in zip(*runs, strict=True))])
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


if __name__ == "__main__":
    main()
