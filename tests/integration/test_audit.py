"""`fedlight audit`, from the configuration file to the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.audit.command import settings_of
from fedlight.cli import audit_parts, main
from fedlight.core.errors import ConfigurationError

CONFIGS = Path(__file__).parents[2] / "configs"
AUDITS = sorted(CONFIGS.glob("audit_*.yaml"))
ATTACKS = "fedlight.audit.attacks"

LENET = {"class_path": "fedlight.audit.networks.SigmoidLeNet", "init_args": {"image_size": 8}}
LINEAR = {"class_path": "LinearCodec", "init_args": {"basis": "random", "ratio": 8, "block_size": 64}}


def settings(folder: Path, **changes) -> list[str]:
    """Write a small audit to a file and return the arguments that run it."""
    given = {
        "base": str(CONFIGS / "digits.yaml"),
        "overrides": {"model": {"network": LENET}, "data": {"proxy_samples": 200}},
        "codecs": {"linear": LINEAR, "top-k": {"class_path": "TopKCodec"}},
        "observations": [{}, {"codec": "linear"}, {"codec": "top-k"}, {"codec": "linear", "clients": 2, "noise": 0.1}],
        "attacks": [
            {"class_path": f"{ATTACKS}.DLG", "init_args": {"steps": 120, "restarts": 1}},
            {"class_path": f"{ATTACKS}.BiasTrick"},
            {"class_path": f"{ATTACKS}.LastLayerLabels"},
            {"class_path": f"{ATTACKS}.InvertingGradients"},
        ],
        "trials": 2,
        "proxy_rounds": 6,
        "lr": 0.1,
        "membership": {"trials": 3, "shadows": 4},
        "canaries": {"count": 40, "noise": [0.0, 1.0]},
        "output": str(folder / "out"),
        **changes,
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(given))
    return ["audit", "--config", str(folder / "audit.yaml")]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / "audit.json").read_text())


@pytest.mark.slow
def test_a_fast_audit_of_digits(tmp_path, capsys):
    main([*settings(tmp_path), "--fast", "true"])
    captured = capsys.readouterr()
    assert "How to read this" in captured.out and "conclusion" in captured.out
    assert "InvertingGradients is left out" in captured.err
    by = {(row["attack"], row["sees"], row["codec"]): row for row in rows(tmp_path)}
    plain = by["DLG", "update of one client", "none"]
    assert plain["psnr_median"] > 30 and plain["control_psnr"] == plain["psnr_median"] and plain["conclusion"].startswith("leaks")
    assert plain["n"] == 2 and plain["seeds"] == [0]
    coded = by["DLG", "code of one client", "linear"]
    assert coded["control_psnr"] == plain["psnr_median"] and coded["message_ratio"] == pytest.approx(8, rel=0.1)
    summed = by["DLG", "sum of 2 codes + noise z=0.1", "linear"]
    assert summed["n"] == 4 and summed["noise"] == 0.1
    assert "TopKCodec" in by["DLG", "code of one client", "top-k"]["conclusion"]
    assert all(
        row["conclusion"].startswith("skipped: the network has no linear first")
        for row in rows(tmp_path)
        if row["attack"] == "BiasTrick" and row["codec"] != "top-k"
    )
    assert by["iDLG labels", "update of one client", "none"]["label_accuracy"] == 1
    assert by["membership (cosine)", "update of one client", "none"]["auc"] == 1
    canaries = [row for row in rows(tmp_path) if row["attack"] == "canaries" and row["codec"] == "linear"]
    assert [row["noise"] for row in canaries] == [0, 1] and canaries[0]["epsilon_lower"] > 0


def test_pictures_are_left_as_files_and_in_tensorboard(tmp_path):
    pytest.importorskip("matplotlib")
    small = [{"class_path": f"{ATTACKS}.DLG", "init_args": {"steps": 3, "restarts": 1}}]
    main(settings(tmp_path, attacks=small, membership={"trials": 0}, canaries={"count": 0}))
    assert (tmp_path / "out" / "initial_dlg.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    assert events.Tags()["images"] == ["audit/initial_dlg"]


@pytest.mark.slow
def test_a_trained_model_is_audited_beside_the_initial_one(tmp_path):
    run = ["--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(CONFIGS / "digits.yaml"), *run, "--model.codec", "null", "--data.proxy_samples", "200"])
    (version,) = (tmp_path / "digits").glob("*/*")
    arguments = settings(
        tmp_path,
        overrides={"data": {"proxy_samples": 200}},
        attacks=[{"class_path": f"{ATTACKS}.BiasTrick"}],
        observations=[{"batch_size": 2, "local_steps": 2}],
        membership={"trials": 0},
        canaries={"count": 0},
    )
    main([*arguments, "--ckpt_path", str(version / "checkpoints" / "last.ckpt")])
    assert [row["model"] for row in rows(tmp_path)] == ["initial", "trained"]
    main(
        settings(tmp_path, attacks=[{"class_path": f"{ATTACKS}.BiasTrick"}], overrides={"data": {"proxy_samples": 200}}, observations=[{}])
    )
    assert rows(tmp_path)[0]["psnr_median"] > 60
    with pytest.raises(SystemExit):
        main([*settings(tmp_path), "--ckpt_path", str(version / "checkpoints" / "last.ckpt")])  # of another network


def test_what_does_not_fit_into_memory_is_a_row_that_says_so(tmp_path):
    small = [{"class_path": f"{ATTACKS}.DLG", "init_args": {"steps": 3}}]
    observations = [{"batch_size": 8}, {"clients": 50}]
    main(settings(tmp_path, attacks=small, observations=observations, membership={"trials": 0}, canaries={"count": 0}, memory_mb=0.1))
    first, second = rows(tmp_path)
    assert "memory_mb" in first["conclusion"] and first["psnr_median"] is None
    assert second["conclusion"].startswith("skipped: Expected 50 clients with at least 1 images each but the data has 20")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"observations": [{"codec": "nowhere"}]}, "nowhere"),
        ({"observations": []}, "observations"),
        ({"trials": 0}, "trials"),
        ({"observations": [{"clients": 0}]}, "clients"),
        ({"ckpt_path": "missing.ckpt"}, "missing.ckpt"),
        ({"overrides": {"data": {"proxy_samples": 0}}}, "proxy"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_mistake_ends_with_one_sentence_before_anything_is_attacked(changes, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(settings(tmp_path, **changes))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("fedlight: error:")
    assert not (tmp_path / "out").exists()


def test_algorithms_with_numbers_beside_the_update_and_without_a_learning_rate():
    base, linear = str(CONFIGS / "digits.yaml"), {"network": LENET, "codec": LINEAR}
    nova = {"class_path": "FedNova", "init_args": {"lr": 0.2, "steps": 2}}
    parts = audit_parts(base, None, {"model": {**linear, "algorithm": nova}})
    assert type(parts.codec).__name__ == "LinearCodec" and parts.lr == 0.2
    assert audit_parts(base, None, {"model": {**linear, "algorithm": {"class_path": "FedSGD"}}}).lr == 1
    own = {"model": {**linear, "algorithm": {"class_path": "ClientOptimizer", "init_args": {"steps": 2}}}}
    with pytest.raises(ConfigurationError, match="`lr` to audit updates of ClientOptimizer"):
        audit_parts(base, None, own)
    assert audit_parts(base, None, own, 0.3).lr == 0.3
    module = {"network": {"class_path": "tests.own.LitClassifier"}, "codec": LINEAR}
    with pytest.raises(ConfigurationError, match="to audit but got the LightningModule LitClassifier"):
        audit_parts(base, None, {"model": module})


@pytest.mark.parametrize("path", AUDITS, ids=lambda path: path.stem)
def test_a_shipped_audit_parses_and_its_base_can_be_made(path, tmp_path, request):
    audit, file = settings_of(["--config", str(path)])
    assert file == path and audit.attacks
    if "digits" in path.stem:
        assert audit_parts(audit.base, CONFIGS, audit.overrides).data.proxy is not None
