"""Runs over Flower beside the same runs simulated: equal weights, seconds a round, bytes.

python tests/benchmarks/deployment.py [--rounds 5] [--only NAME]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedlight.flower.demo import Lab
from tests.flower.deployed import VARIANTS, configure, simulated, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    table = []
    for name, changes in VARIANTS.items():
        if given.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab(Path(folder) / "lab", ["north", "south", "west"])
            configure(lab, changes)
            try:
                lab.start()
                start = time.monotonic()
                status = lab.run("--trainer.max_steps", str(given.rounds))
                seconds = time.monotonic() - start
                traffic = lab.traffic()
            finally:
                lab.stop()
            simulation = simulated(lab, Path(folder) / "simulated", "--trainer.max_steps", str(given.rounds))
            equal = status == 0 and weights(lab.root / "logs") == weights(simulation)
            table.append(f"{name}: exit {status}, weights equal {equal}, {seconds:.0f} s, {traffic}")
    print("\n".join(table))


if __name__ == "__main__":
    main()
