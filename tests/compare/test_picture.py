from __future__ import annotations

import builtins
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.compare.picture import draw, draw_pictures
from fedlight.core.errors import ConfigurationError


def row(codec: str, accuracy: float = 0.95, sent: float = 1e6, std: float | None = 0.01) -> dict:
    return {
        "codec": codec,
        "uplink_ratio": 8.0,
        "accuracy_mean": accuracy,
        "accuracy_std": std,
        "uplink_bytes": sent,
        "total_bytes": 1e7 + sent,
    }


ROWS = [row("none", 0.96, 8e6), row("mine"), row("twin"), row("alone", 0.9, 2e6, None)]


def test_the_figure_names_every_codec_and_its_axes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(ROWS, "total_bytes", "bytes", "none", "Digits, 5 rounds, seeds 0, 1")
    (axes,) = figure.axes
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.texts} == {"none", "mine (8x)", "twin (8x)", "alone (8x)"}
    assert axes.get_xscale() == "log" and "accuracy" in axes.get_ylabel() and axes.get_title().startswith("Digits, 5 rounds, seeds 0, 1")


def test_one_codec_can_be_drawn():
    assert draw(ROWS[:1], "uplink_bytes", "bytes", "none", "").axes


def test_pictures_go_to_files_and_to_tensorboard(tmp_path):
    paths = draw_pictures(ROWS, tmp_path, "none", "title")
    assert [path.name for path in paths] == ["compare.png", "compare_uplink.png"]
    for path in paths:
        head = path.read_bytes()[:24]
        assert head[:4] == b"\x89PNG" and int.from_bytes(head[16:20], "big") == 1000
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == {"compare/total_bytes", "compare/uplink_bytes"}


def test_a_missing_matplotlib_is_told(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'fedlight\[plot\]'"):
        draw_pictures(ROWS, tmp_path, "none", "title")
    assert not list(tmp_path.iterdir())
