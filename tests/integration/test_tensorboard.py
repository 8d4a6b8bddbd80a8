"""What TensorBoard shows, read back from the events of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from fedlight.callbacks.board import can_draw
from fedlight.core.metric_names import RESULTS

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
    "tag",
    ["loss/local_training", "communication/uplink_total", "communication/downlink_total", "codec/aggregate_length"],
)
def test_one_point_a_round(events, tag):
    assert list(series(events, tag)) == list(range(ROUNDS))


def test_what_never_changes_is_no_curve_but_in_the_card(events):
    tags = events.Tags()["scalars"]
    assert not [
        tag for tag in tags if tag in ("clients/counted", "clients/dropped", "clients/attempts", "communication/uplink_ratio", "epoch")
    ]
    lonely = [tag for tag in tags if len(events.Scalars(tag)) < 2 and not tag.startswith("results/")]
    assert not lonely
    text = events.Tensors("run/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "clients/counted | 3 |" in text and "communication/uplink_ratio" in text
    assert "| codec | autoencoder-3x-quantize-6bit |" in text and "both ways" in text and "fedlight fit --config " in text


def test_every_tag_has_a_group_and_a_sentence(events):
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups <= {"accuracy", "loss", "communication", "clients", "privacy", "codec", "simulation", "results", "server"}
    for tag in events.Tags()["scalars"]:
        assert len(events.SummaryMetadata(tag).summary_description.split()) > 4, tag


def test_bytes_are_cumulative_and_end_where_the_summary_does(events, finished):
    summary = json.loads((finished / "summary.json").read_text())
    uplink, downlink = series(events, "communication/uplink_total"), series(events, "communication/downlink_total")
    assert uplink[ROUNDS - 1] == summary["uplink_bytes"] and downlink[ROUNDS - 1] == summary["downlink_bytes"]
    assert sorted(uplink.values()) == list(uplink.values())


def test_validation_by_rounds_and_by_kilobytes(events, finished):
    accuracy = series(events, "accuracy/validation")
    assert len(accuracy) == 3
    assert list(accuracy)[-1] in (ROUNDS - 1, ROUNDS)
    assert list(accuracy.values())[-1] == pytest.approx(json.loads((finished / "summary.json").read_text())["val_accuracy"])
    assert len(series(events, "clients/accuracy_mean")) == 3
    companion = EventAccumulator(str(finished / "by_kilobytes"))
    companion.Reload()
    points = series(companion, "by_kilobytes/accuracy_validation")
    assert list(points.values()) == list(accuracy.values())
    sent = [series(events, f"communication/{way}_total") for way in ("uplink", "downlink")]
    assert list(points) == [round(sum(way[min(step, ROUNDS - 1)] for way in sent) / 1000) for step in accuracy]


def test_comparisons_only_in_the_rounds_asked_for(events):
    assert list(series(events, "simulation/relative_error")) == list(series(events, "simulation/cosine")) == [0, 3]


def test_histograms_of_the_codes(events):
    for tag in ("codec/mean_code", "codec/sum_of_codes"):
        histograms = events.Histograms(tag)
        assert [histogram.step for histogram in histograms] == [0, 3]
        assert histograms[0].histogram_value.num > 0


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed: pip install 'fedlight[plot]'")
def test_pictures(events):
    assert {*events.Tags()["images"]} == {"clients/accuracy_of_each", "codec/mean_code_over_rounds", "codec/energy_kept_by_layer"}
    assert all(events.Images(tag)[0].width > 400 for tag in events.Tags()["images"])


def test_pretraining_is_shown(finished):
    events = EventAccumulator(str(finished / "pretrain"))
    events.Reload()
    assert "codec/held_out_error" in events.Tags()["scalars"]


def test_a_layout_puts_accuracy_beside_bytes(events):
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    assert "Accuracy and bytes" in [category.title for category in layout.category]
    tags = events.Tags()["scalars"]
    wanted = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert sum(any(re.match(one, tag) for tag in tags) for one in wanted) >= len(wanted) - 2


def test_settings_and_final_figures_are_on_the_hparams_tab(events, finished):
    data = events.summary_metadata
    tags = {tag for tag, metadata in data.items() if metadata.plugin_data.plugin_name == "hparams"}
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= tags
    start = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/session_start_info"].plugin_data.content)
    settings = start.session_start_info.hparams
    assert settings["network"].string_value == "MLP"
    assert settings["clients"].number_value == 6
    assert settings["codec"].string_value == "autoencoder-3x-quantize-6bit"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/experiment"].plugin_data.content)
    assert {info.name.tag for info in experiment.experiment.metric_infos} == {*RESULTS}
    summary = json.loads((finished / "summary.json").read_text())
    assert events.Scalars("results/test_accuracy")[-1].value == pytest.approx(summary["test_accuracy"], rel=1e-6)
    assert events.Scalars("results/megabytes_both_ways")[-1].value == pytest.approx(
        (summary["uplink_bytes"] + summary["downlink_bytes"]) / 1e6, rel=1e-6
    )
