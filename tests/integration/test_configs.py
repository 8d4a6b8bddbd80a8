"""Every file in configs/ parses and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fedlight.cli import main
from tests.federation import run_folders, write_npz, write_speeches

FOLDER = Path(__file__).parents[2] / "configs"
COMPARISONS = sorted([*FOLDER.glob("compare_*.yaml"), *FOLDER.glob("audit_*.yaml")])  # run by test_compare.py and test_audit.py
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(COMPARISONS))
SMALL = [
    "--trainer.max_steps",
    "2",
    "--trainer.val_check_interval",
    "1",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
]
SMALL += ["--pretraining.proxy.rounds", "6", "--pretraining.proxy.clients", "2", "--pretraining.proxy.samples", "16"]
SMALL += ["--pretraining.training.steps", "2", "--pretraining.training.check_every", "1", "--model.algorithm.init_args.steps", "1"]
COHORT = ["--data.sampler.init_args.cohort_size", "2"]


def test_there_are_configurations():
    assert {"digits.yaml", "pretrain.yaml", "mnist.yaml", "mnist_transform.yaml", "cifar10.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.quick(5)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_parses(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    asked, got = yaml.safe_load(path.read_text()), yaml.safe_load(capsys.readouterr().out)
    assert got["trainer"]["max_steps"] == asked["trainer"]["max_steps"]
    algorithm = asked["model"]["algorithm"]["init_args"]
    assert {name: got["model"]["algorithm"]["init_args"][name] for name in algorithm} == algorithm


@pytest.mark.parametrize("path", [*CONFIGS, *COMPARISONS], ids=lambda path: path.stem)
def test_it_has_no_machine_path_and_explains_its_keys(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# ")
    assert not re.search(r"(/home|/root|/tmp|/work|C:\\)", path.read_text())
    assert sum("#" in line for line in lines) >= 10


def run(path: Path, folder: Path, *options: str, command: str = "fit") -> dict:
    main([command, "--config", str(path), "--trainer.default_root_dir", str(folder), *SMALL, *options])
    if command == "pretrain":
        return {}
    (version,) = run_folders(folder / yaml.safe_load(path.read_text())["experiment"])
    return json.loads((version / "summary.json").read_text())


def config(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def test_digits_runs(tmp_path):
    figures = run(config("digits"), tmp_path, *COHORT)
    assert figures["rounds"] == 2 and figures["clients"] == 20
    assert figures["uplink_ratio"] > 20


def test_pretrain_runs_both_ways(tmp_path):
    run(config("pretrain"), tmp_path, "--output", str(tmp_path / "codec"), "--cohort_rounds", "0", command="pretrain")
    assert {path.name for path in (tmp_path / "codec").iterdir()} == {"encoder.safetensors", "decoder.safetensors"}
    figures = run(config("pretrain"), tmp_path / "fit", "--model.codec_path", str(tmp_path / "codec"))
    assert figures["rounds"] == 2 and figures["pretrain_seconds"] == 0


PARAMETERS = {"mnist": 61_706, "mnist_transform": 61_706, "mnist_secure": 61_706, "mnist_silos": 61_706, "mnist_shards": 61_706}
PARAMETERS |= {"mnist_entropy": 61_706, "mnist_fedlab": 199_210, "cifar10": 122_570}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", PARAMETERS)
def test_image_configurations_run_on_a_file_of_the_same_shape(name, tmp_path):
    write_npz(tmp_path / "images.npz", (3, 32, 32) if name == "cifar10" else (28, 28), samples=300)
    file = ["--data.source", "ArrayFile", "--data.source.init_args.path", str(tmp_path / "images.npz"), "--data.proxy_samples", "40"]
    options = [*file, "--data.num_clients", "10"]
    if name == "mnist_secure":  # two clients hide nothing
        options += ["--data.sampler.init_args.cohort_size", "10"]
    elif name != "mnist_silos":  # where everybody takes part
        options += COHORT
    if name == "mnist_fedlab":
        options += ["--model.algorithm.init_args.epochs", "null"]
    figures = run(config(name), tmp_path, *options)
    assert figures["parameters"] == PARAMETERS[name]
    assert figures["uplink_ratio"] > 50
    assert ("handshake_uplink_bytes" in figures) == (name == "mnist_secure")


@pytest.mark.slow
def test_the_resnet_configuration_runs_on_smaller_images(tmp_path):
    write_npz(tmp_path / "images.npz", (3, 16, 16), samples=60)
    file = ["--data.source", "ArrayFile", "--data.source.init_args.path", str(tmp_path / "images.npz"), "--data.proxy_samples", "10"]
    few = ["--data.num_clients", "4", "--model.algorithm.init_args.batch_size", "4", "--model.client_memory_mb", "64"]
    figures = run(config("cifar10_resnet"), tmp_path, *file, *few, *COHORT, "--trainer.num_sanity_val_steps", "0")
    assert figures["parameters"] == 11_173_962
    assert figures["uplink_ratio"] > 50


def test_one_client_a_speaker_runs_on_a_made_up_text(tmp_path):
    text = ["--data.source.init_args.path", str(write_speeches(tmp_path / "text.txt")), "--data.source.init_args.length", "10"]
    few = ["--data.partitioner.init_args.min_samples", "1", "--data.proxy_samples", "40", "--model.network.init_args.hidden", "32"]
    figures = run(config("speakers"), tmp_path, *text, *few, *COHORT)
    assert figures["clients"] == 4 and figures["uplink_ratio"] > 20


@pytest.mark.slow
def test_adapters_of_one_half_of_the_speakers_sit_on_a_base_of_the_other(tmp_path):
    text = ["--data.source.init_args.path", str(write_speeches(tmp_path / "text.txt")), "--data.source.init_args.length", "10"]
    small = ["--data.proxy_samples", "40", "--trainer.max_steps", "1"]
    run(config("lora_base"), tmp_path, *text, *small, "--data.num_clients", "2", *COHORT)
    (base,) = (tmp_path / "lora_base").rglob("last.ckpt")
    few = ["--data.partitioner.init_args.min_samples", "1", "--model.network.init_args.base", str(base)]
    figures = run(config("lora"), tmp_path, *text, *small, *few, *COHORT)
    assert figures["clients"] == 2 and figures["parameters"] == 2 * 4 * 2 * 4 * 128 + 2 * 2 * 4 * 5 * 128 + 4 * (128 + 97)
    assert figures["uplink_ratio"] > 10


@pytest.mark.slow
def test_differential_privacy_runs_on_a_file_of_the_same_shape(tmp_path):
    write_npz(tmp_path / "images.npz", (28, 28), samples=300)
    file = ["--data.source", "ArrayFile", "--data.source.init_args.path", str(tmp_path / "images.npz"), "--data.proxy_samples", "40"]
    few = ["--data.num_clients", "10", "--data.sampler.init_args.rate", "0.3", "--model.privacy.init_args.delta", "0.01"]
    figures = run(config("mnist_dp"), tmp_path, *file, *few)
    assert 7.9 < figures["epsilon_if_cohorts_secret"] <= 8.0 < figures["epsilon"]
    assert figures["privacy"]["rounds"] == 2 and figures["privacy"]["noise"] == "operating system"
    assert figures["uplink_ratio"] > 50


def test_the_baseline_of_a_refreshed_run_does_without_the_refresh(tmp_path):
    """And its folder says how to repeat it: without a codec."""
    write_npz(tmp_path / "images.npz", (28, 28), samples=300)
    file = ["--data.source", "ArrayFile", "--data.source.init_args.path", str(tmp_path / "images.npz"), "--data.proxy_samples", "40"]
    options = [*file, "--data.num_clients", "10", *COHORT, "--baseline", "true"]
    main(["fit", "--config", str(config("mnist_transform")), "--trainer.default_root_dir", str(tmp_path), *SMALL, *options])
    first, second = run_folders(tmp_path / "mnist_transform")
    ratios = [json.loads((folder / "summary.json").read_text())["uplink_ratio"] for folder in (first, second)]
    assert ratios[0] > 100 and round(ratios[1]) == 1
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert configs[0]["model"]["codec"] and not configs[1]["model"]["codec"] and not configs[1]["baseline"]


@pytest.mark.slow
def test_mnist_by_writer_runs_on_the_real_data(data_root, tmp_path):
    if not (data_root / "mnist_writers.npz").is_file():
        pytest.skip(f"real data absent: no mnist_writers.npz under {data_root}; set FEDLIGHT_DATA")
    figures = run(config("mnist_writers"), tmp_path, "--data.root", str(data_root), *COHORT)
    assert 500 < figures["clients"] <= 539 and figures["uplink_ratio"] > 50


@pytest.mark.slow
def test_mnist_runs_on_the_real_data(data_root, tmp_path):
    if not (data_root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"real data absent: no MNIST/raw under {data_root}; set FEDLIGHT_DATA")
    figures = run(config("mnist"), tmp_path, "--data.root", str(data_root), *COHORT)
    assert figures["clients"] == 100 and figures["uplink_ratio"] > 50
