"""A real SuperLink and real SuperNodes on loopback, with TLS and node keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from fedlight.flower.demo import Lab
from tests.flower.deployed import configure, simulated, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path / "lab", ["north", "south"])
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_rounds_over_a_network_are_those_of_a_simulation(lab: Lab, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configure(lab, {})
    assert lab.run("--trainer.max_steps", "3") == 0, capfd.readouterr().out[-3000:]
    simulation = simulated(lab, tmp_path / "simulated", "--trainer.max_steps", "3")
    assert weights(lab.root / "logs") == weights(simulation)
    shown = capfd.readouterr().out
    assert "[north]" in shown and "test accuracy" in shown
