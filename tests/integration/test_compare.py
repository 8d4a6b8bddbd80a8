"""`fedlight compare`, from the configuration file to the pictures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from fedlight.cli import dry_run, main
from fedlight.compare.command import check_codecs, settings_of
from fedlight.compare.plan import Comparison, read_base
from fedlight.console.settings import settings_parser
from tests.integration.comparisons import CONFIGS, settings, status

COMPARISONS = sorted(CONFIGS.glob("compare_*.yaml"))


def long(path: Path) -> bool:
    """Whether building every entry takes more than a few seconds."""
    return len(yaml.safe_load(path.read_text())["codecs"]) > 5


# -- configurations ----------------------------------------------------------------------------------------------------


def test_there_are_comparisons():
    assert {path.stem for path in COMPARISONS} >= {"compare_digits", "compare_mnist"}


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * long(path)) for path in COMPARISONS], ids=[path.stem for path in COMPARISONS]
)
def test_every_codec_of_a_comparison_can_be_built(path):
    comparison, file = settings_of(["--config", str(path)])
    parsed = check_codecs(comparison, read_base(comparison.base, file and file.parent), dry_run)
    assert set(parsed) == set(comparison.codecs)
    assert parsed[comparison.reference]["model"]["codec"] is None
    parts = ("codec", "algorithm", "server_optimizer", "availability", "privacy")
    what = lambda one: [*map(one["model"].get, parts), one["trainer"]["callbacks"], one["data"]["proxy_source"]]  # noqa: E731
    different = {json.dumps(what(one)) for one in parsed.values()}
    assert len(different) == len(parsed), "no two entries are the same"
    assert all(one["threads"] == 1 and one["trainer"]["logger"] is True for one in parsed.values())


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
        tuned = {lr: json.loads((place / f"seed_0_lr_{lr}" / "0" / "summary.json").read_text()) for lr in (1.0, 1.5)}
        assert row["server_lr"] == max(tuned, key=lambda lr: tuned[lr]["val_accuracy"])
        used = [json.loads((place / f"seed_{s}_lr_{row['server_lr']}" / "0" / "summary.json").read_text()) for s in (0, 1)]
        assert row["accuracy_mean"] == pytest.approx(sum(one["test_accuracy"] for one in used) / 2)
        assert {path.name for path in place.iterdir()} == {"seed_0_lr_1.0", "seed_0_lr_1.5", f"seed_1_lr_{row['server_lr']}"}


@pytest.mark.slow
def test_all_codecs_of_a_seed_start_from_the_same_first_round(compared):
    folder, _ = compared
    true = {path.parents[1].name.split("_")[1]: [] for path in folder.glob("runs/*/*/0/true.pt")}
    for path in folder.glob("runs/*/*/0/true.pt"):
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


# -- mistakes ----------------------------------------------------------------------------------------------------------


def with_codec(**codec) -> dict:
    return {"codecs": {"none": None, "mine": {"model": {"codec": codec}}}}


MISTAKES: dict[str, tuple[dict, str]] = {
    "unknown key": ({"sedes": [0]}, "no option sedes .* did you mean seeds"),
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


@pytest.mark.quick(4)
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
    for action in (one for one in settings_parser("compare", Comparison)._actions if one.dest not in ("help", "print_config")):
        assert action.help and len(action.help.split("(type")[0].split()) >= 4, action.dest
        assert f"--{action.dest}" in printed
