from __future__ import annotations

import builtins
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.compare.labels import Box, place_labels
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
FRAME = Box(0, 0, 1000, 600)


@given(st.lists(st.tuples(st.floats(100, 800), st.floats(100, 500)), min_size=1, max_size=10))
def test_labels_cover_neither_each_other_nor_points(points):
    taken = [Box(x - 7, y - 7, 14, 14) for x, y in points]
    boxes = place_labels(points, [(100.0, 14.0)] * len(points), FRAME, taken)
    for i, box in enumerate(boxes):
        assert box.overlap(FRAME) == pytest.approx(box.area)
        assert all(box.overlap(other) < 1 for other in [*boxes[:i], *taken])


def test_a_lone_point_has_its_label_to_the_right():
    (box,) = place_labels([(500, 300)], [(80, 14)], FRAME)
    assert 500 < box.x < 520 and box.y == 293


def test_overlap_is_an_area():
    assert Box(0, 0, 2, 2).overlap(Box(1, 1, 5, 5)) == 1
    assert Box(0, 0, 1, 1).overlap(Box(1, 0, 1, 1)) == 0
    assert Box(0, 0, 2, 2).nearest(5, 1) == (2, 1)


def test_the_figure_names_every_codec_and_its_axes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(ROWS, "total_bytes", "bytes", "none", "Digits, 5 rounds, seeds 0, 1")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"none", "mine (8x)", "twin (8x)", "alone (8x)"}
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
