"""The TensorBoard logger: what changes is a curve, what does not is none, and a resumed run goes on with its curves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.callbacks.board import BY_KILOBYTES, RunBoard, energy_kept
from fedlight.callbacks.summary import codec_label, run_label
from fedlight.clients import FedProx
from fedlight.codecs import ChainCodec, IdentityCodec, LinearCodec, PowerSGDCodec, QuantizeCodec, TransformCodec
from fedlight.core.layout import Layout
from fedlight.core.metric_names import METRICS, metric_names, shown
from tests.federation import federated, learned


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_a_metric_is_a_curve_from_its_first_step_once_it_changes(tmp_path):
    board = RunBoard(str(tmp_path))
    for step, value in enumerate([3.0, 3.0, 3.0, 2.0, 2.0]):
        board.log_metrics({"round/clients": value, "round/dropped": 0.0, "epoch": step}, step=step)
    assert board.steady() == {"round/dropped": 0.0}
    board.finalize("success")
    assert curve(tmp_path / "0", "clients/counted") == [(0, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]
    assert curve(tmp_path / "0", "clients/dropped") == curve(tmp_path / "0", "epoch") == []


@pytest.mark.parametrize(("metric", "tag"), [("val/accuracy", "accuracy_validation"), ("val_f1", "val_f1")])
def test_validation_is_drawn_over_the_kilobytes_of_both_directions(metric, tag, tmp_path):
    board = RunBoard(str(tmp_path))
    for step, accuracy in enumerate([0.5, 0.6]):
        board.log_metrics({"bytes/uplink": 2000.0 * (step + 1), "bytes/downlink": 5000.0 * (step + 1)}, step=step)
        board.log_metrics({metric: accuracy}, step=step)
    board.finalize("success")
    points = curve(tmp_path / "0" / BY_KILOBYTES, f"by_kilobytes/{tag}")
    assert [step for step, _ in points] == [7, 14] and [value for _, value in points] == pytest.approx([0.5, 0.6])


def test_a_resumed_run_has_the_earlier_curve_up_to_where_it_begins(tmp_path):
    first = RunBoard(str(tmp_path), version="0")
    for step in range(6):  # the last checkpoint was before round 4
        first.log_metrics({"sim/loss": 10.0 + step}, step=step)
    first.finalize("failed")
    again = RunBoard(str(tmp_path), version="1")
    again.resume(tmp_path / "0")
    for step in (4, 5, 6):
        again.log_metrics({"sim/loss": 20.0 + step}, step=step)
    again.finalize("success")
    assert [value for _, value in curve(tmp_path / "1", "loss/local_training")] == [10.0, 11.0, 12.0, 13.0, 24.0, 25.0, 26.0]
    assert len(curve(tmp_path / "0", "loss/local_training")) == 6, "the earlier run is as it was"


def test_tags_differ_and_names_of_ones_own_stay():
    tags = [shown(name).tag for name in metric_names()]
    assert len({*tags}) == len(tags)
    assert all(shown(name).description.endswith(".") for name in metric_names())
    assert {tag.partition("/")[0] for tag in tags} == {"accuracy", "loss", "communication", "clients", "privacy", "codec", "simulation"}
    assert all("real server would not" in how.description for name, how in METRICS.items() if name.startswith("sim/"))
    assert shown("my_metric").tag == "my_metric"


def test_runs_are_named_after_what_differs():
    assert run_label(federated()) == "no-codec"
    assert run_label(federated(codec=TransformCodec(ratio=35))) == "transform-35x"
    assert run_label(federated(codec=learned(bits=6), algorithm=FedProx(lr=0.1, steps=1, mu=0.1))) == "fedprox-autoencoder-2x-quantize-6bit"
    assert codec_label(PowerSGDCodec(rank=2)) == "powersgd-rank2"
    assert codec_label(ChainCodec([LinearCodec(ratio=4.5), QuantizeCodec(bits=4)])) == "linear-4.5x-quantize-4bit"
    assert codec_label(IdentityCodec()) == "no-codec"


def test_energy_kept_is_one_of_what_is_kept_whole_and_none_of_what_is_lost():
    layout = Layout(("kept", "lost", "half", "still"), ((2,), (3,), (2,), (1,)))
    true = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    decoded = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert energy_kept(layout, decoded, true) == {"kept": 1.0, "lost": 0.0, "half": 0.5}
