"""What TensorBoard shows, read back from the events of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

ROUNDS = 6


@pytest.fixture(scope="module")
def events(finished: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(finished), size_guidance={"histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def series(events: EventAccumulator, tag: str) -> dict[int, float]:
    points = [(event.step, event.value) for event in events.Scalars(tag)]
    assert len(dict(points)) == len(points), f"{tag} was logged twice in a step"
    return dict(points)


@pytest.mark.parametrize(
    "tag", ["sim/loss", "bytes/uplink", "bytes/downlink", "bytes/codec", "bytes/ratio", "round/clients", "round/dropped"]
)
def test_one_point_a_round(events, tag):
    assert list(series(events, tag)) == list(range(ROUNDS))


def test_bytes_are_cumulative_and_end_where_the_summary_does(events, finished):
    uplink, each = series(events, "bytes/uplink"), series(events, "bytes/uplink_round")
    for number in range(ROUNDS):
        assert uplink[number] == sum(each[n] for n in range(number + 1))
    summary = json.loads((finished / "summary.json").read_text())
    assert uplink[ROUNDS - 1] == summary["uplink_bytes"]
    assert series(events, "bytes/downlink")[ROUNDS - 1] == summary["downlink_bytes"]
    assert series(events, "bytes/ratio")[ROUNDS - 1] == pytest.approx(summary["uplink_ratio"])


def test_validation_by_rounds(events, finished):
    accuracy = series(events, "val/accuracy")
    assert len(accuracy) == 3
    assert list(accuracy)[-1] in (ROUNDS - 1, ROUNDS)
    assert list(accuracy.values())[-1] == pytest.approx(json.loads((finished / "summary.json").read_text())["val_accuracy"])
    assert len(series(events, "val/client_accuracy_mean")) == 3


def test_comparisons_only_in_the_rounds_asked_for(events):
    assert list(series(events, "sim/relative_error")) == list(series(events, "sim/cosine")) == [0, 3]


def test_histograms_of_the_codes(events):
    for tag in ("code/mean", "code/sum"):
        histograms = events.Histograms(tag)
        assert [histogram.step for histogram in histograms] == [0, 3]
        assert histograms[0].histogram_value.num > 0


def test_pretraining_is_shown(events):
    assert "pretrain/held_out_error" in events.Tags()["scalars"]


def test_settings_and_final_figures_are_on_the_hparams_tab(events, finished):
    data = events.summary_metadata
    tags = {tag for tag, metadata in data.items() if metadata.plugin_data.plugin_name == "hparams"}
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= tags
    start = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/session_start_info"].plugin_data.content)
    settings = start.session_start_info.hparams
    assert settings["network"].string_value == "MLP"
    assert settings["clients"].number_value == 6
    assert "AutoencoderCodec" in settings["codec"].string_value
    experiment = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/experiment"].plugin_data.content)
    names = {info.name.tag for info in experiment.experiment.metric_infos}
    assert {"test_accuracy", "uplink_ratio", "uplink_bytes"} <= names
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("test_accuracy", "uplink_ratio", "uplink_bytes"):
        assert events.Scalars(name)[-1].value == pytest.approx(summary[name], rel=1e-6)
