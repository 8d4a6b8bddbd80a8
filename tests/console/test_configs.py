"""Shipped configurations are found by name anywhere, listed and copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedlight.compare.plan import read_base
from fedlight.console.check import check
from fedlight.console.configs import command, find, folder, shipped, with_files
from fedlight.core.errors import ConfigurationError

DIGITS = folder() / "digits.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test runs in the checkout, where `configs/` is at hand."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "configs/digits.yaml"])
def test_a_name_means_the_shipped_file(name):
    assert find(name) == DIGITS


def test_a_file_in_the_current_folder_comes_first():
    Path("digits.yaml").write_text("mine: 1")
    assert find("digits.yaml") == Path("digits.yaml")
    assert find("digits") == DIGITS


def test_an_unknown_name_is_told_the_nearest_one():
    with pytest.raises(ConfigurationError, match="no file digitz; did you mean digits"):
        find("digitz")
    with pytest.raises(ConfigurationError, match=r"no file other/digits\.yaml"):
        find("other/digits.yaml")


def test_arguments_have_files_for_names():
    written_out = '{"trainer": {}}'
    args = ["fit", "-c", "digits", "--config=mnist", "--config", written_out, "--experiment", "digits"]
    mnist = folder() / "mnist.yaml"
    assert with_files(args) == ["fit", "-c", str(DIGITS), f"--config={mnist}", "--config", written_out, "--experiment", "digits"]
    with pytest.raises(ConfigurationError, match="mnits"):
        with_files(["fit", "--config=mnits"])
    assert with_files(["fit", "--config"]) == ["fit", "--config"], "what is missing is the parser's to say"


def test_a_comparison_may_start_from_a_shipped_one_by_name(tmp_path):
    assert read_base("digits", tmp_path) == read_base("digits.yaml", None) == yaml.safe_load(DIGITS.read_text())
    (tmp_path / "digits.yaml").write_text("experiment: near")
    assert read_base("digits.yaml", tmp_path) == {"experiment": "near"}


def test_all_are_listed_with_a_sentence(capsys):
    command([])
    lines = capsys.readouterr().out.splitlines()
    for name in shipped():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 4


def test_they_are_listed_by_command(capsys):
    command([])
    for part in capsys.readouterr().out.split("For `fedlight ")[1:]:
        what, _, names = part.partition(" --config NAME`:\n")
        listed = [line.split()[0] for line in names.partition("\n\n")[0].splitlines()]
        assert listed and all((name.partition("_")[0] == what) == (what != "fit") for name in listed)


@pytest.mark.parametrize(
    ("subcommand", "name", "meant"),
    [("fit", "compare_digits", "compare"), ("compare", "digits", "fit"), ("audit", "compare_digits", "compare")],
)
def test_one_of_another_command_is_told_its_own(subcommand, name, meant):
    with pytest.raises(ConfigurationError, match=f"^{name} is for `fedlight {meant} --config {name}`"):
        check([subcommand, "--config", name])


def test_copies_are_made_and_nothing_is_overwritten(tmp_path, capsys):
    command(["digits", "mnist", "--to", "mine"])
    assert (tmp_path / "mine" / "digits.yaml").read_bytes() == DIGITS.read_bytes()
    assert (tmp_path / "mine" / "mnist.yaml").is_file()
    (tmp_path / "mine" / "mnist.yaml").write_text("changed")
    (tmp_path / "mine" / "digits.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"no file mine/mnist\.yaml"):
        command(["digits", "mnist", "--to", "mine"])
    assert (tmp_path / "mine" / "mnist.yaml").read_text() == "changed" and not (tmp_path / "mine" / "digits.yaml").exists()
