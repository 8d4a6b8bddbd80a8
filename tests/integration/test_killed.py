"""A run under differential privacy that is killed: the ledger on the disk has every sum that was opened, and the run that goes on too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.benchmarks.kills import SUMS, kill


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("privacy", SUMS)
def test_the_ledger_has_every_sum_that_a_killed_run_opened(privacy: str, seed: int, tmp_path: Path) -> None:
    """A line more is one that was written and its sum not opened."""
    counted = kill(tmp_path, random.Random(seed), privacy)
    assert counted.opened >= 1
    assert counted.opened <= counted.journal <= counted.opened + 1
    assert counted.checkpoint <= counted.journal == counted.resumed
