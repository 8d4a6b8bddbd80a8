"""Comparisons whose worker processes do many runs, fail or are stopped."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import yaml

from fedlight.cli import main
from tests.federation import write_npz
from tests.integration.comparisons import CONFIGS, SMALL, settings, status
from tests.processes import fork, wait_until

pytestmark = pytest.mark.slow


def test_every_codec_of_the_mnist_comparison_runs_on_a_file_of_the_same_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "images.npz", (28, 28), samples=300)
    source = {"class_path": "ArrayFile", "init_args": {"path": str(tmp_path / "images.npz")}}
    overrides = {**SMALL, "data": {**SMALL["data"], "source": source}}
    few = ["--seeds", "[0]", "--server_lrs", "[1.0]", "--overrides", json.dumps(overrides), "--output", "out"]
    assert status(["compare", "--config", str(CONFIGS / "compare_mnist.yaml"), *few]) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(rows) == len(yaml.safe_load((CONFIGS / "compare_mnist.yaml").read_text())["codecs"])


def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, capsys):
    broken = {"model": {"codec": None, "algorithm": {"init_args": {"lr": 1e38, "steps": 3}}}}
    args = settings(tmp_path, codecs={"none": None, "broken": broken}, seeds=[0], server_lrs=[1.0], jobs=1)
    assert status(args) == 1
    captured = capsys.readouterr()
    assert "failed: broken, seed 0, rate 1: RoundFailedError" in captured.err and "broken: no results" in captured.err
    assert [row["codec"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())] == ["none"]


def test_runs_that_differ_in_more_than_codecs_are_pointed_out(tmp_path, capsys):
    other = {"data": {"num_clients": 5}}
    args = settings(tmp_path, codecs={"none": None, "other": other}, seeds=[0], server_lrs=[1.0], jobs=1)
    assert status(args) == 0
    assert re.search(
        "seed 0: the first round's loss should be the same .* none: .*; other: .* differ in more than codecs", capsys.readouterr().err
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda stop: stop.name)
def test_a_stop_ends_the_workers_too_and_what_was_done_stays_done(stop, tmp_path, capsys):
    marker = tmp_path / "rounds"
    slow = {"class_path": "tests.federation.Slow", "init_args": {"marker": str(marker), "seconds": 60.0, "after": 2}}
    codecs = {"none": None, "slow": {"model": {"codec": None}, "trainer": {"callbacks": [slow]}}}
    short = {"seeds": [0], "server_lrs": [1.0]}
    args = settings(tmp_path, codecs=codecs, **short)

    def compare() -> None:
        os.setsid()  # a group of its own, which its workers belong to
        main(args)

    process = fork(compare, tmp_path / "output.txt")
    try:
        wait_until(lambda: process.poll() is not None or (marker.is_file() and marker.read_text() == "2"), [process])
        process.send(stop)
        assert process.wait() == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop], process.last_words()
        told = process.log.read_text()
        assert "Traceback" not in told and ("the same command resumes" in told) == (stop is not signal.SIGKILL), told
        wait_until(lambda: not group_lives(process.pid), [])
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert [path.parts[-3] for path in (tmp_path / "out").rglob("done.json")] == ["none"]
    assert status(settings(tmp_path, codecs={"none": None}, **short)) == 0
    assert "finished before" in capsys.readouterr().err


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
