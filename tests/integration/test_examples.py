"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.federation import environment

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs go to the current folder's logs."""
    monkeypatch.chdir(tmp_path)


def test_there_are_three_and_each_says_how_to_run_it():
    files = sorted(FOLDER.glob("*.py"))
    assert [path.stem for path in files] == ["gradient_codes", "own_codec", "own_module"]
    for path in files:
        assert f"python examples/{path.name}" in path.read_text()
        assert len(path.read_text().splitlines()) <= 70


def test_a_module_of_ones_own(capsys):
    assert load("own_module").main(rounds=12) > 0.5
    assert "times shorter" in capsys.readouterr().out


def test_a_codec_of_ones_own(capsys):
    assert load("own_codec").main(rounds=12) > 0.3
    assert "messages 7." in capsys.readouterr().out


def test_the_codec_keeps_the_laws():
    import torch

    from fedlight.core.codec import Context, Private
    from fedlight.core.layout import Layout

    codec = load("own_codec").GroupCodec().bind(Layout.vector(21))
    updates = torch.randn(3, 21)
    private = Private(torch.Generator())
    codes = [codec.encoder.encode(update, Context(), private) for update in updates]
    mean = codec.decoder.decode(torch.stack(codes).mean(0), Context(), {})
    torch.testing.assert_close(mean, codec.decoder.decode(codec.encoder.encode(updates.mean(0), Context(), private), Context(), {}))
    assert not codec.encoder.encode(torch.zeros(21), Context(), private).any()


def test_gradient_codes_on_one_device(capsys):
    assert load("gradient_codes").main(epochs=2, devices=1) > 4
    assert "times fewer bytes" in capsys.readouterr().out


@pytest.mark.slow
def test_gradient_codes_under_ddp(tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / "gradient_codes.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("times fewer bytes") == 1
