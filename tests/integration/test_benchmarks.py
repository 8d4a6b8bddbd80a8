"""`make bench` runs: its scripts are no part of the package, so nothing else finds a name that is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_throughput_is_measured_beside_the_bare_loop(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--only", "b1", "--repeats", "1", "--threads", "1", "--output", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400)
    rows = json.loads((tmp_path / "benchmarks.json").read_text())
    assert {row["system"] for row in rows} == {"fedlight", "bare loop"}
    assert all(row["rounds_per_second"] > 0 for row in rows)
