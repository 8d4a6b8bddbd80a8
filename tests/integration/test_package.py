"""The wheel: built, installed in an environment of its own, run in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("hatchling") is None or find_spec("pip") is None, reason="hatchling or pip is not installed: make env"),
]

MODULE = """\
import fedlight
from fedlight.modules import MLP


class MyNetwork(MLP):
    '''A class of the user's own, in the current folder.'''
"""


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def script(wheel, tmp_path_factory) -> Path:
    """The console script of an environment with nothing of the checkout: the wheel, and the other packages of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    bin = folder / ("Scripts" if os.name == "nt" else "bin")
    python("-m", "pip", "--python", str(bin / "python"), "install", "--no-deps", "--quiet", str(wheel))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin / "fedlight"


def run(script: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_configurations_and_the_types(wheel):
    names = {*zipfile.ZipFile(wheel).namelist()}
    assert {f"fedlight/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert {"fedlight/py.typed", "fedlight/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]


def test_configurations_are_at_hand_anywhere(script, tmp_path):
    assert "digits " in run(script, tmp_path, "configs")
    assert run(script, tmp_path, "--version").startswith("fedlight 0.")
    assert str(script.parents[1]) in run(script, tmp_path, "doctor")


def test_a_shipped_configuration_runs_to_the_table_with_a_class_of_the_current_folder(script, tmp_path):
    (tmp_path / "my_networks.py").write_text(MODULE)
    few = ["--trainer.max_steps", "2", "--pretraining.proxy.rounds", "6", "--data.sampler.cohort_size", "2"]
    printed = run(script, tmp_path, "fit", "--config", "digits", "--model.network", "my_networks.MyNetwork", *few)
    assert "Federated run" in printed and "test accuracy" in printed
    (summary,) = tmp_path.glob("logs/digits/**/summary.json")
    assert json.loads(summary.read_text())["rounds"] == 2
