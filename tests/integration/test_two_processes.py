"""Law 5 over processes: two make the run of one, integer codes bit for bit."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlight.core.export import load_codec
from tests.federation import CODEC, TINY, environment, invoke, run_folders
from tests.processes import in_two_processes

ROUNDS = 3


CODECS: dict[str, str | None] = {
    "learned integers": CODEC,
    "learned integers, in threads": CODEC,
    "identity": None,
    "top-k": json.dumps({"class_path": "TopKCodec", "init_args": {"ratio": 8}}),
    "power sgd": json.dumps({"class_path": "PowerSGDCodec", "init_args": {"rank": 1}}),
    "transform, refreshed": json.dumps({"class_path": "TransformCodec", "init_args": {"ratio": 6, "encoder_share": 1.0}}),
}
INTEGERS = {"learned integers", "learned integers, in threads", "transform, refreshed"}
THREADS = ["--model.engine", "Threaded", "--model.engine.workers", "2"]
REFRESH = ["--trainer.callbacks+", "fedlight.callbacks.CodecRefresh", "--trainer.callbacks.every_n_rounds", "2"]
REFRESH += ["--trainer.callbacks.proxy.rounds", "8", "--trainer.callbacks.proxy.clients", "3", "--model.downlink", "CatchUp"]


def arguments(folder: Path, processes: int, codec: str | None, more: list[str]) -> list[str]:
    """Return the options of a run over so many processes, which leaves the sums of codes in ``codes``."""
    options = ["--trainer.max_steps", str(ROUNDS), "--trainer.val_check_interval", "1"]
    options += ["--data.client_holdout", "0.2", "--data.eval_batch_size", "37", "--data.sampler.cohort_size", "5"]
    options += ["--trainer.callbacks", "tests.federation.CodeDump", "--trainer.callbacks.folder", str(folder / "codes")]
    options += [*more, *(["--model.codec", codec] if codec else [])]
    return [*options, "--trainer.devices", str(processes), *(["--trainer.strategy", "ddp"] if processes > 1 else [])]


def fit(folder: Path, processes: int, codec: str | None, more: list[str]) -> Path:
    """Run `fedlight fit`, in this process or in two forked ones, and return the run's folder."""
    options = arguments(folder, processes, codec, more)
    if processes == 1:
        invoke("fit", folder, *options)
    else:
        in_two_processes(lambda: invoke("fit", folder, *options), folder)
    return run_of(folder)


def run_of(folder: Path) -> Path:
    """Return the folder of the only run."""
    (run,) = run_folders(folder / "federated")
    return run


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "learned integers")) for name in CODECS])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bool]:
    """One process's run and two processes' run, these with two threads each that train, where threads are asked for."""
    folders = [tmp_path_factory.mktemp(f"processes{count}") for count in (1, 2)]
    more = REFRESH if "refreshed" in request.param else []
    threads = THREADS if "threads" in request.param else []
    one, two = (fit(folder, count, CODECS[request.param], more + threads * (count - 1)) for count, folder in enumerate(folders, 1))
    return one, two, request.param in INTEGERS


def test_the_sums_of_codes_are_the_same(runs):
    one, two, integers = runs
    for number in range(ROUNDS):
        a, b = (torch.load(run.parents[2] / "codes" / f"round_{number}.pt") for run in (one, two))
        assert a.dtype == b.dtype == (torch.int64 if integers else torch.float64)
        assert torch.equal(a, b) if integers else torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_the_final_model_and_codec_are_the_same(runs):
    one, two, integers = runs
    for name in ("model", "encoder", "decoder"):
        a, b = (load_file(run / f"{name}.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            same = torch.equal(a[key], b[key]) if integers else torch.allclose(a[key], b[key], rtol=1e-6, atol=1e-7)
            assert same, f"{name}: {key}"


def test_a_refreshed_codec_has_the_next_version_everywhere(runs):
    one, two, _ = runs
    for run in (one, two):
        version = load_codec(run).version
        assert version == (2 if (run / "config.yaml").read_text().count("CodecRefresh") else min(version, 1))


def test_bytes_and_evaluation_count_everything_once(runs):
    """Accuracy over odd numbers of samples: one counted twice, or none, would show."""
    one, two, _ = runs
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    for name in ("rounds", "uplink_bytes", "downlink_bytes", "codec_bytes", "uplink_bytes_per_client"):
        assert a[name] == b[name], name
    names = ["val_accuracy", "test_accuracy", *(name for name in a if "client_accuracy" in name)]
    assert len(names) > 3
    for name in names:
        assert a[name] == pytest.approx(b[name], abs=1e-6), name
    assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-5)


def test_one_file_of_metrics_with_the_same_rounds(runs):
    figures = []
    for run in runs[:2]:
        with (run / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("sim/loss")]
        figures.append([(int(row["step"]), float(row["round/clients"]), float(row["sim/loss"])) for row in rows])
    assert len(figures[0]) == ROUNDS
    for mine, theirs in zip(*figures, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_the_command_line_starts_the_second_process_itself(tmp_path):
    """Without a launcher of one's own: Lightning's runs the same command again, and the sums are those of one process."""
    invoke("fit", tmp_path / "one", *arguments(tmp_path / "one", 1, CODEC, []))
    command = [sys.executable, "-m", "fedlight.cli", "fit", *TINY, "--trainer.default_root_dir", str(tmp_path / "two")]
    command += arguments(tmp_path / "two", 2, CODEC, [])
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    for number in range(ROUNDS):
        a, b = (torch.load(tmp_path / name / "codes" / f"round_{number}.pt") for name in ("one", "two"))
        assert torch.equal(a, b)
    assert (run_of(tmp_path / "two") / "model.safetensors").read_bytes() == (run_of(tmp_path / "one") / "model.safetensors").read_bytes()
