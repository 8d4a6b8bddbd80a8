"""Damaged and forged files: a few hundred of the thousands that ``tests/benchmarks/mutations.py`` makes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.benchmarks.mutations import bank_files, change_bytes, checkpoint_files, codec_files, load_one, run


@pytest.mark.parametrize(("make", "error", "count"), [(codec_files, "CodecMismatchError", 400), (bank_files, "ConfigurationError", 200)])
def test_every_fault_is_the_documented_error_in_little_time_and_memory(make, error: str, count: int) -> None:
    found = run(make, count, seed=1)
    assert found.classes.keys() <= {error, "loads"} and found.classes[error] > 0.9 * count
    assert found.seconds < 1 and found.megabytes < 100


def test_a_run_goes_on_from_a_mutated_checkpoint_or_refuses_it_with_the_documented_error() -> None:
    """Forged values that a run can follow, such as other weights with a digest that fits, load."""
    found = run(checkpoint_files, 40, seed=1)
    assert found.classes.keys() <= {"ConfigurationError", "CodecMismatchError", "loads"} and found.classes["ConfigurationError"] > 20
    assert found.seconds < 1 and found.megabytes < 100


@pytest.mark.parametrize("make", [codec_files, bank_files])
def test_a_file_that_loads_with_changed_bytes_says_what_it_said(make, tmp_path: Path) -> None:
    """Such as one with another space in it: no single number differs."""
    draw = random.Random(2)
    files = [path for path in make(tmp_path) if path.name != "bank5.safetensors"][:4]
    for path in files:
        raw = path.read_bytes()
        sound = content(load_one(path))
        for _ in range(60):
            path.write_bytes(change_bytes(raw, draw))
            try:
                loaded = load_one(path)
            except ValueError:
                continue
            assert content(loaded) == sound
        path.write_bytes(raw)


def content(loaded: object) -> list[object]:
    if hasattr(loaded, "recorded"):
        return [loaded.layout, loaded.recorded.tolist()]
    return [loaded.digest, {name: tensor.tolist() for name, tensor in loaded.state_dict().items()}]
