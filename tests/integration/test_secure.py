"""Secure aggregation from the command line."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.federation import CODEC, run_folders

SECURE = ["--model.aggregator", "SecureAggregator", "--model.aggregator.cohort", "3"]
RUN = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--model.codec", CODEC]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_same_model_with_it_and_without_and_bytes_for_both(fedlight, tmp_path):
    fedlight("fit", tmp_path, *RUN, "--experiment", "plain")
    fedlight("fit", tmp_path, *RUN, *SECURE, "--experiment", "secure")
    plain, secure = run_folders(tmp_path)
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, secure))
    assert all((one[name] == two[name]).all() for name in one)
    a, b = summary(plain), summary(secure)
    assert a["test_accuracy"] == b["test_accuracy"] and a["uplink_bytes_per_client"] < b["uplink_bytes_per_client"]
    assert b["uplink_bytes"] == 6 * b["uplink_bytes_per_client"] + b["handshake_uplink_bytes"]
    named = len("advertise_keys") - len("train")  # the stage of the request that holds the download
    assert b["downlink_bytes"] == a["downlink_bytes"] + b["handshake_downlink_bytes"] + 6 * named
    assert "handshake_uplink_bytes" not in a
    assert b["uplink_ratio_with_handshakes"] == pytest.approx(4 * b["parameters"] * 6 / b["uplink_bytes"])
    header = (secure / "metrics.csv").read_text().splitlines()[0]
    assert "sim/" not in header and "bytes/handshake" in header


def test_a_run_is_repeated_from_its_own_config_and_resumed(fedlight, tmp_path, capsys):
    drop_outs = ["--model.aggregator.threshold", "2", "--model.availability", "StageDropOut", "--model.availability.clients", "1"]
    fedlight("fit", tmp_path, *RUN, *SECURE, *drop_outs, "--experiment", "first")
    (first,) = run_folders(tmp_path)
    more = ["--config", str(first / "config.yaml"), "--trainer.max_steps", "3"]
    fedlight("fit", tmp_path, *more, "--ckpt_path", str(first / "checkpoints" / "last.ckpt"))
    assert summary(run_folders(tmp_path)[1])["rounds"] == 3


def test_the_baseline_sends_floats_and_does_without(fedlight, tmp_path):
    fedlight("fit", tmp_path, *RUN, *SECURE, "--baseline", "true", "--experiment", "both")
    secure, baseline = map(summary, run_folders(tmp_path))
    assert "handshake_uplink_bytes" in secure and "handshake_uplink_bytes" not in baseline
    assert round(baseline["uplink_ratio"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SECURE, "IdentityCodec sends floats"),
        ([*RUN[4:], *SECURE[:3], "2"], "cohort of at least 3 clients but got 2"),
        ([*RUN[4:], *SECURE, "--model.weighting", "samples"], "raise `model.aggregator.init_args.max_weight`"),
        ([*RUN[4:], *SECURE, "--data.sampler.cohort_size", "4"], "raise `model.aggregator.init_args.cohort`"),
    ],
)
def test_mistakes_are_told_in_one_sentence(fedlight, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stopped:
        fedlight("fit", tmp_path, "--trainer.max_steps", "1", *options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
