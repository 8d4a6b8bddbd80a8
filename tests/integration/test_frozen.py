"""Numbers do not change unawares: small runs of every kind end with the weights and bytes that are recorded."""

from __future__ import annotations

import json

import pytest

from tests.integration.frozen import FILE, RUNS, machine, observe

RECORD = json.loads(FILE.read_text())


def test_every_run_is_recorded() -> None:
    assert list(RECORD["runs"]) == list(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_as_recorded(name: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit on the machine of the record; elsewhere products round otherwise, and a rounded code may fall on the other side."""
    if "MNIST" in name:
        request.getfixturevalue("data_root")
    expected, found = RECORD["runs"][name], observe(RUNS[name]())
    if machine() == RECORD["machine"]:
        assert found == expected
    else:
        assert found["norm"] == pytest.approx(expected["norm"], rel=0.02)
        assert found["uplink"] == pytest.approx(expected["uplink"], rel=0.1)
