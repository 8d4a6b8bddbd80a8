from __future__ import annotations

from pathlib import Path

import pytest

from fedlight.compare.plan import (
    Comparison,
    Run,
    choose_rate,
    digest,
    effective,
    first_runs,
    further_runs,
    number_of_runs,
    read_base,
)
from fedlight.console.arguments import merge
from fedlight.core.errors import ConfigurationError


def comparison(**changes) -> Comparison:
    return Comparison(**{"base": "base.yaml", "codecs": {"none": None, "mine": {}}, "seeds": [0, 1, 2], "server_lrs": [1.0, 1.5]} | changes)


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_every_rate_is_tried_on_the_tuning_seeds_and_the_best_runs_on_the_rest():
    plan = comparison(tune_seeds=[0, 1])
    assert first_runs(plan, "mine") == [Run("mine", seed, lr) for lr in (1.0, 1.5) for seed in (0, 1)]
    assert further_runs(plan, "mine", 1.5) == [Run("mine", 2, 1.5)]
    assert number_of_runs(plan) == 10


def test_one_rate_needs_no_tuning():
    plan = comparison(server_lrs=[1.25])
    assert first_runs(plan, "none") == [Run("none", seed, 1.25) for seed in (0, 1, 2)]
    assert further_runs(plan, "none", 1.25) == []


def test_a_tuning_seed_need_not_be_among_the_results():
    plan = comparison(tune_seeds=[9])
    assert {run.seed for run in first_runs(plan, "mine")} == {9}
    assert further_runs(plan, "mine", 1.0) == [Run("mine", seed, 1.0) for seed in (0, 1, 2)]


def test_every_codec_gets_the_same_grid():
    plan = comparison()
    runs = {codec: {(run.seed, run.lr) for run in first_runs(plan, codec)} for codec in plan.codecs}
    assert runs["none"] == runs["mine"]


def test_the_rate_is_the_best_on_average_and_a_rate_with_a_failed_run_is_left_out():
    assert choose_rate({1.0: [0.8, 0.9], 1.5: [0.95, 0.7]}, seeds=2) == 1.0
    assert choose_rate({1.0: [0.8, 0.9], 1.5: [0.99]}, seeds=2) == 1.0
    assert choose_rate({1.0: [0.9], 1.5: [0.9]}, seeds=1) == 1.0
    assert choose_rate({1.0: [], 1.5: [0.9]}, seeds=2) is None


def test_runs_have_folders_of_their_own():
    plan = comparison(tune_seeds=[0, 1, 2])
    runs = [run for codec in plan.codecs for run in first_runs(plan, codec)]
    assert len({run.folder(Path("out")) for run in runs}) == len(runs) == 12


# -- the configuration of a run ----------------------------------------------------------------------------------------

BASE = {
    "model": {"codec": {"class_path": "ChainCodec", "init_args": {"codecs": []}}, "min_clients": 2},
    "trainer": {"max_steps": 10, "logger": False},
}


def config(changes, overrides=None):
    return effective(BASE, overrides or {}, changes, Run("mine", 3, 1.5), Path("there"))


def test_a_null_codec_is_no_codec():
    assert config(None)["model"]["codec"] is None and config(None)["model"]["codec_path"] is None
    assert config({})["model"]["codec"] == BASE["model"]["codec"]


def test_a_codec_of_another_class_brings_only_its_own_arguments():
    model = config({"model": {"codec": {"class_path": "LinearCodec"}}})["model"]
    assert model["codec"] == {"class_path": "LinearCodec"} and model["min_clients"] == 2
    other = merge(BASE, {"model": {"codec": {"class_path": "fedlight.codecs.ChainCodec", "init_args": {"x": 1}}}})
    assert other["model"]["codec"]["init_args"] == {"codecs": [], "x": 1}


def test_overrides_come_before_the_codec_s_changes():
    trainer = config({"trainer": {"max_steps": 30}}, {"trainer": {"max_steps": 20, "precision": "bf16-mixed"}})["trainer"]
    assert (trainer["max_steps"], trainer["precision"]) == (30, "bf16-mixed")


def test_seed_rate_threads_and_folder_are_the_run_s():
    whole = config({"seed_everything": 8, "trainer": {"default_root_dir": "elsewhere"}})
    assert (whole["seed_everything"], whole["threads"]) == (3, 1)
    assert whole["trainer"]["default_root_dir"] == "there" and whole["trainer"]["logger"] is True
    assert (whole["trainer"]["devices"], whole["trainer"]["strategy"]) == (1, "auto")
    assert whole["model"]["server_optimizer"] == {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.5}}


def test_the_rest_of_the_server_optimizer_is_kept():
    momentum = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.9}}
    assert config({"model": {"server_optimizer": momentum}})["model"]["server_optimizer"]["init_args"] == {"lr": 1.5, "momentum": 0.9}
    assert config({"model": {"server_optimizer": "Adam"}})["model"]["server_optimizer"] == {"class_path": "Adam", "init_args": {"lr": 1.5}}


def test_rates_are_factors_on_an_entrys_own():
    adaptive = {"class_path": "FedAdam", "init_args": {"lr": 0.01, "params": None}}  # `params`: what the parser makes of free text
    model = config({"model": {"server_optimizer": adaptive}})["model"]
    assert model["server_optimizer"] == {"class_path": "FedAdam", "init_args": {"lr": pytest.approx(0.015)}}


def test_the_inputs_are_left_alone():
    before = repr(BASE)
    config({"model": {"min_clients": 5}})
    assert repr(BASE) == before


def test_the_digest_tells_settings_apart_and_not_folders():
    run = Run("mine", 0, 1.0)
    parsed = {"trainer": {"max_steps": 3, "default_root_dir": "a"}, "model": {"codec": None}}
    moved = {**parsed, "trainer": {"max_steps": 3, "default_root_dir": "b"}}
    assert digest(parsed, run) == digest(moved, run) == digest(parsed, Run("renamed", 0, 1.0))
    others = [({**parsed, "model": {"codec": "x"}}, run), (parsed, Run("mine", 1, 1.0)), (parsed, Run("mine", 0, 1.5))]
    assert len({digest(parsed, run), *(digest(*other) for other in others)}) == 4


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, r"`seeds` to be a list of one or more different numbers but got \[\]"),
        ({"seeds": [1, 1]}, r"`seeds`.*different.*\[1, 1\]"),
        ({"seeds": [-1]}, "`seeds`.* >= 0"),
        ({"tune_seeds": []}, "`tune_seeds`"),
        ({"server_lrs": []}, "`server_lrs`"),
        ({"server_lrs": [0.0, 1.0]}, "`server_lrs` > 0"),
        ({"jobs": 0}, "`jobs` >= 1 but got 0"),
        ({"target": 95.0}, "`target`.*0.95"),
        ({"codecs": {}}, "`reference` to be one of"),
        ({"reference": "plain"}, "`reference` to be one of none, mine but got 'plain': add `plain: null`"),
        ({"codecs": {"none": None, "nil": None}}, "one uncompressed .* but got none, nil"),
        ({"codecs": {"none": None, "a/b": {}}}, "'a/b': leave slashes out"),
        ({"codecs": {"none": None, "..": {}}}, r"'\.\.'"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        comparison(**changes)


def test_the_base_is_looked_for_beside_the_file_first(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "base.yaml").write_text("experiment: current folder")
    monkeypatch.chdir(tmp_path)
    assert read_base("base.yaml", tmp_path / "here") == {"experiment": "current folder"}
    (tmp_path / "here" / "base.yaml").write_text("experiment: beside")
    assert read_base("base.yaml", tmp_path / "here") == {"experiment": "beside"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "`base` to be a YAML file or the name of a shipped configuration but there is no file base.yaml"),
        ("- 1", "a mapping of options in .*base.yaml but got list"),
        ("a: [", "YAML but .*base.yaml is none: line"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "base.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_base("base.yaml", tmp_path)
