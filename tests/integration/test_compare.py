"""`fedlight compare`, from the configuration file to the pictures."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fedlight.cli import dry_run, main
from fedlight.compare.command import check_codecs, compare_parser, read_settings
from fedlight.compare.plan import read_base
from tests.federation import write_npz
from tests.processes import fork, wait_until

CONFIGS = Path(__file__).parents[2] / "configs"
COMPARISONS = sorted(CONFIGS.glob("compare_*.yaml"))

SMALL = {
    "trainer": {"max_steps": 3, "val_check_interval": 1, "accelerator": "cpu", "enable_checkpointing": False},
    "data": {"num_clients": 6, "proxy_samples": 60, "sampler": {"init_args": {"cohort_size": 3}}},
    "model": {"algorithm": {"init_args": {"steps": 1}}},
    "pretraining": {"proxy": {"rounds": 10, "clients": 3, "samples": 12}, "training": {"steps": 4, "check_every": 2}},
}
LINEAR = {"model": {"codec": {"class_path": "LinearCodec", "init_args": {"ratio": 4, "block_size": 32}}}}


def settings(folder: Path, **changes) -> list[str]:
    """Write a small comparison to a file and return the arguments that run it."""
    overrides = {**SMALL, "trainer": {**SMALL["trainer"], "callbacks": [{"class_path": "tests.federation.TrueDump"}]}}
    given = {
        "base": str(CONFIGS / "digits.yaml"),
        "overrides": overrides,
        "codecs": {"none": None, "linear": LINEAR},
        "seeds": [0, 1],
        "server_lrs": [1.0, 1.5],
        "tune_seeds": [0],
        "target": 0.01,
        "output": str(folder / "out"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump(given | changes, sort_keys=False))
    return ["compare", "--config", str(folder / "mine.yaml")]


def status(args: list[str]) -> int:
    try:
        main(args)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


# -- configurations ----------------------------------------------------------------------------------------------------


def test_there_are_comparisons():
    assert {path.stem for path in COMPARISONS} >= {"compare_digits", "compare_mnist"}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_codec_of_a_comparison_can_be_built(path):
    comparison, beside, _ = read_settings(["--config", str(path)])
    parsed = check_codecs(comparison, read_base(comparison.base, beside), dry_run)
    assert set(parsed) == set(comparison.codecs)
    assert parsed[comparison.reference]["model"]["codec"] is None
    parts = ("codec", "algorithm", "server_optimizer", "availability", "privacy")
    what = lambda one: [*map(one["model"].get, parts), one["trainer"]["callbacks"], one["data"]["proxy_source"]]  # noqa: E731
    different = {json.dumps(what(one)) for one in parsed.values()}
    assert len(different) == len(parsed), "no two entries are the same"
    assert all(one["threads"] == 1 and one["trainer"]["logger"] is True for one in parsed.values())


@pytest.mark.slow
def test_every_codec_of_the_mnist_comparison_runs_on_a_file_of_the_same_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "images.npz", (28, 28), samples=300)
    source = {"class_path": "ArrayFile", "init_args": {"path": str(tmp_path / "images.npz")}}
    overrides = {**SMALL, "data": {**SMALL["data"], "source": source}}
    few = ["--seeds", "[0]", "--server_lrs", "[1.0]", "--overrides", json.dumps(overrides), "--output", "out"]
    assert status(["compare", "--config", str(CONFIGS / "compare_mnist.yaml"), *few]) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(rows) == len(yaml.safe_load((CONFIGS / "compare_mnist.yaml").read_text())["codecs"])


# -- a comparison ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The results of a small comparison and the arguments that made it."""
    folder = tmp_path_factory.mktemp("compared")
    args = settings(folder, jobs=2)
    assert status(args) == 0
    return folder / "out", args


@pytest.mark.slow
def test_a_comparison_leaves_everything_it_promises(compared):
    folder, _ = compared
    names = {path.name for path in folder.iterdir()}
    assert {"compare.csv", "compare.json", "compare.png", "compare_uplink.png", "settings.json", "runs"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = json.loads((folder / "compare.json").read_text())
    assert [row["codec"] for row in rows] == ["none", "linear"]
    plain, linear = rows
    assert plain["seeds"] == linear["seeds"] == [0, 1]
    assert plain["gap_points"] == 0 and linear["gap_points"] is not None
    assert plain["encoder_bytes"] == 0 < linear["encoder_bytes"] and linear["codec_bytes"] > 0
    assert linear["uplink_bytes"] < plain["uplink_bytes"] and linear["uplink_ratio"] > 3
    assert linear["rounds_to_target"] == 1 and 0 < linear["bytes_to_target"] < linear["total_bytes"]
    with (folder / "compare.csv").open(newline="") as file:
        assert [row["codec"] for row in csv.DictReader(file)] == ["none", "linear"]


@pytest.mark.slow
def test_accuracy_is_that_of_the_last_round_and_the_rate_is_chosen_on_validation(compared):
    folder, _ = compared
    for row in json.loads((folder / "compare.json").read_text()):
        place = folder / "runs" / row["codec"]
        tuned = {lr: json.loads((place / f"seed_0_lr_{lr}" / "version_0" / "summary.json").read_text()) for lr in (1.0, 1.5)}
        assert row["server_lr"] == max(tuned, key=lambda lr: tuned[lr]["val_accuracy"])
        used = [json.loads((place / f"seed_{s}_lr_{row['server_lr']}" / "version_0" / "summary.json").read_text()) for s in (0, 1)]
        assert row["accuracy_mean"] == pytest.approx(sum(one["test_accuracy"] for one in used) / 2)
        assert {path.name for path in place.iterdir()} == {"seed_0_lr_1.0", "seed_0_lr_1.5", f"seed_1_lr_{row['server_lr']}"}


@pytest.mark.slow
def test_all_codecs_of_a_seed_start_from_the_same_first_round(compared):
    folder, _ = compared
    true = {path.parents[1].name.split("_")[1]: [] for path in folder.glob("runs/*/*/version_0/true.pt")}
    for path in folder.glob("runs/*/*/version_0/true.pt"):
        true[path.parents[1].name.split("_")[1]].append(torch.load(path))
    assert {seed: len(found) for seed, found in true.items()} == {"0": 4, "1": 2}
    assert all(torch.equal(found[0], other) for found in true.values() for other in found)
    assert not torch.equal(true["0"][0], true["1"][0])


@pytest.mark.slow
def test_a_comparison_that_is_done_is_read_and_not_run(compared, capsys):
    folder, args = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    rows = (folder / "compare.json").read_text()
    assert status(args) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()} == before
    assert (folder / "compare.json").read_text() == rows
    captured = capsys.readouterr()
    assert "Run 6/6" in captured.err and captured.err.count("finished before") == 6
    assert "linear" in captured.out and "compare.png" in captured.out


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, capsys):
    broken = {"model": {"codec": None, "algorithm": {"init_args": {"lr": 1e38, "steps": 3}}}}
    args = settings(tmp_path, codecs={"none": None, "broken": broken}, seeds=[0], server_lrs=[1.0])
    assert status(args) == 1
    captured = capsys.readouterr()
    assert "failed: broken, seed 0, rate 1: RoundFailedError" in captured.err and "broken: no results" in captured.err
    assert [row["codec"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())] == ["none"]


@pytest.mark.slow
def test_runs_that_differ_in_more_than_codecs_are_pointed_out(tmp_path, capsys):
    other = {"data": {"num_clients": 5}}
    args = settings(tmp_path, codecs={"none": None, "other": other}, seeds=[0], server_lrs=[1.0])
    assert status(args) == 0
    assert re.search(
        "seed 0: the first round's loss should be the same .* none: .*; other: .* differ in more than codecs", capsys.readouterr().err
    )


@pytest.mark.slow
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
        assert "Traceback" not in told and ("the same command goes on" in told) == (stop is not signal.SIGKILL), told
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


# -- mistakes ----------------------------------------------------------------------------------------------------------


def with_codec(**codec) -> dict:
    return {"codecs": {"none": None, "mine": {"model": {"codec": codec}}}}


MISTAKES: dict[str, tuple[dict, str]] = {
    "unknown key": ({"sedes": [0]}, "compare: .*sedes"),
    "wrong type": ({"seeds": "many"}, "compare: .*seeds"),
    "no seeds": ({"seeds": []}, "`seeds` to be a list of one or more"),
    "missing base": ({"base": "absent.yaml"}, "`base` .* no file absent.yaml"),
    "reference not in the list": ({"reference": "plain"}, "`reference` to be one of none, linear but got 'plain'"),
    "a reference with a codec": ({"reference": "linear"}, "`reference` to be uncompressed but 'linear' has a codec"),
    "unknown codec class": (with_codec(class_path="NoSuchCodec"), "codecs.mine: .*NoSuchCodec"),
    "unknown codec argument": (with_codec(class_path="LinearCodec", init_args={"rato": 2}), "codecs.mine: .*rato"),
    "codec argument out of range": (with_codec(class_path="LinearCodec", init_args={"ratio": 0.1}), "codecs.mine: Expected `ratio` >= 1"),
    "unknown option of a part": ({"codecs": {"none": None, "mine": {"model": {"codek": 1}}}}, "codecs.mine: .*codek"),
    "unknown part": ({"codecs": {"none": None, "mine": {"modle": {}}}}, "codecs.mine: .*modle"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_a_sentence_and_status_2_before_anything_runs(name, tmp_path, capfd):
    changes, message = MISTAKES[name]
    assert status(settings(tmp_path, **changes)) == 2
    errors = capfd.readouterr().err.strip()
    assert errors.count("\n") == 0 and errors.startswith("fedlight: error: "), errors
    assert re.search(message, errors), errors
    assert len(errors) < 300, errors
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_told(tmp_path, capfd):
    assert status(["compare", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capfd.readouterr().err


# -- help --------------------------------------------------------------------------------------------------------------


def test_every_option_is_explained_in_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for action in compare_parser()._actions:
        assert action.help and len(action.help.split("(type")[0].split()) >= 4, action.dest
        assert f"--{action.dest}" in printed
