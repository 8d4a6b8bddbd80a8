"""The command line, run in this process."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedlight.cli import main
from fedlight.codecs import ChainCodec
from fedlight.core.codec import Context, Private
from fedlight.core.export import load_decoder, load_encoder
from fedlight.data import Everyone, FederatedDataModule
from fedlight.modules import MLP
from tests.federation import CODEC, environment, run_folders


def last_run(folder: Path, experiment: str = "federated") -> Path:
    return run_folders(folder / experiment)[-1]


def summary(folder: Path, experiment: str = "federated") -> dict:
    return json.loads((last_run(folder, experiment) / "summary.json").read_text())


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "encoder.safetensors",
        "decoder.safetensors",
        "model.safetensors",
        "summary.json",
    }
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    names = [path.name for path in (finished / "checkpoints").iterdir()]
    assert sorted(re.sub(r"\.[0-9a-f]{8}\.", ".*.", name) for name in names) == [
        "best.*.clients.keep-secret",
        "best.ckpt",
        "last.*.clients.keep-secret",
        "last.ckpt",
    ]


def test_the_summary_has_the_promised_keys(finished):
    figures = json.loads((finished / "summary.json").read_text())
    promised = "test_accuracy val_accuracy rounds clients seed uplink_bytes_per_client uplink_bytes downlink_bytes codec_bytes uplink_ratio"
    assert {*promised.split(), "train_seconds", "pretrain_seconds", "versions"} <= set(figures)
    assert (figures["rounds"], figures["clients"], figures["seed"]) == (6, 6, 0)


def test_model_and_codec_files_are_of_use_without_the_run(finished):
    network = MLP(64, [4], 10)
    network.load_state_dict(load_file(finished / "model.safetensors"))
    encoder, decoder = load_encoder(finished / "encoder.safetensors"), load_decoder(finished / "decoder.safetensors")
    context = Context(broadcast=decoder.broadcast({}))
    message = encoder.encode_message(torch.randn(encoder.dim) * 0.01, context, Private(torch.Generator()))
    assert decoder.decode_sum([message], [1], context, {}).shape == (encoder.dim,)


def test_metrics_csv_has_a_row_a_round(finished):
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["bytes/uplink"]] == list(range(6))
    assert sum(bool(row["val/accuracy"]) for row in rows) == 3
    assert sum(bool(row["sim/cosine"]) for row in rows) == 2


def test_the_saved_configuration_makes_the_same_run_again(finished, tmp_path):
    main(["fit", "--config", str(finished / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)])
    mine, theirs = (load_file(place / "model.safetensors") for place in (last_run(tmp_path, "done"), finished))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# -- subcommands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(command, finished, fedlight, tmp_path, capsys):
    fedlight(
        command,
        tmp_path,
        "--model.codec",
        CODEC,
        "--data.client_holdout",
        "0.2",
        "--ckpt_path",
        str(finished / "checkpoints" / "last.ckpt"),
    )
    printed = capsys.readouterr().out
    prefix = {"validate": "val", "test": "test"}[command]
    assert f"{prefix}/accuracy" in printed
    assert f"{json.loads((finished / 'summary.json').read_text())[f'{prefix}_accuracy']:.6f}"[:6] in printed


def test_labels_are_predicted(finished, fedlight, tmp_path):
    fedlight("predict", tmp_path, "--model.codec", CODEC, "--ckpt_path", str(finished / "checkpoints" / "last.ckpt"))
    (path,) = tmp_path.rglob("predictions.csv")
    header, *labels = path.read_text().split()
    data = FederatedDataModule(proxy_samples=60, num_clients=6, sampler=Everyone())
    data.setup()
    assert header == "label" and len(labels) == len(data.test[1])
    accuracy = float((torch.tensor([int(label) for label in labels]) == data.test[1]).float().mean())
    assert accuracy == pytest.approx(json.loads((finished / "summary.json").read_text())["test_accuracy"], abs=1e-6)


def test_pretrain_then_fit_with_its_codec(fedlight, tmp_path, capsys):
    fedlight("pretrain", tmp_path, "--model.codec", CODEC, "--output", str(tmp_path / "codec"), "--cohort_rounds", "0")
    assert "Pretraining" in capsys.readouterr().out
    fedlight("fit", tmp_path, "--model.codec_path", str(tmp_path / "codec"), "--trainer.max_steps", "2")
    fedlight("fit", tmp_path, "--model.codec", CODEC, "--trainer.max_steps", "2")
    given, fresh = run_folders(tmp_path)[-2:]
    assert all(torch.equal(a, b) for a, b in zip(*(load_file(run / "model.safetensors").values() for run in (given, fresh)), strict=True))
    assert json.loads((given / "summary.json").read_text())["pretrain_seconds"] == 0


def test_the_baseline_is_the_same_run_without_a_codec(fedlight, tmp_path, capsys):
    fedlight("fit", tmp_path, "--model.codec", CODEC, "--baseline", "true", "--trainer.max_steps", "2")
    printed = capsys.readouterr().out
    assert "this run" in printed and "without a codec" in printed
    first, second = (json.loads((run / "summary.json").read_text()) for run in run_folders(tmp_path))
    assert first["uplink_ratio"] > 5 > 1 >= second["uplink_ratio"]
    fedlight("fit", tmp_path / "plain", "--trainer.max_steps", "2")
    mine, theirs = (load_file(place / "model.safetensors") for place in (last_run(tmp_path), last_run(tmp_path / "plain")))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# -- Trainer flags -----------------------------------------------------------------------------------------------------


def test_fast_dev_run_trains_a_round_and_leaves_no_files(fedlight, tmp_path):
    fedlight("fit", tmp_path, "--trainer.fast_dev_run", "true", "--model.codec", CODEC)
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("batches", ["1", "0"])
def test_limit_val_batches(batches, fedlight, tmp_path):
    fedlight(
        "fit", tmp_path, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", batches,
        "--data.eval_batch_size", "20",
    )  # fmt: skip
    assert ("val_accuracy" in summary(tmp_path)) == (batches == "1")


def test_no_progress_bar(fedlight, tmp_path, capsys):
    fedlight("fit", tmp_path, "--trainer.max_steps", "2")  # TINY turns it off
    assert "Round 2" not in capsys.readouterr().err
    fedlight("fit", tmp_path, "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "true")
    shown = capsys.readouterr()
    assert "Round 2/2" in shown.err and "Curves: tensorboard" in shown.out


def test_no_logger(fedlight, tmp_path, capsys):
    fedlight("fit", tmp_path, "--trainer.max_steps", "2", "--trainer.logger", "false")
    assert "tensorboard" not in capsys.readouterr().out  # which would show nothing
    assert not list(tmp_path.rglob("events.*")) and not list(tmp_path.rglob("metrics.csv"))


def test_neither_logger_nor_checkpoints_ends_with_figures_and_names_no_folder(fedlight, tmp_path, capsys):
    fedlight("fit", tmp_path, "--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    shown = capsys.readouterr().out
    assert "test accuracy" in shown and "this run:" not in shown


def test_no_checkpoints(fedlight, tmp_path):
    fedlight("fit", tmp_path, "--trainer.max_steps", "2", "--trainer.enable_checkpointing", "false")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert summary(tmp_path)["rounds"] == 2


def test_a_logger_of_ones_own(fedlight, tmp_path, capsys):
    fedlight(
        "fit", tmp_path, "--trainer.max_steps", "2", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "own")
    )
    assert list((tmp_path / "own").rglob("metrics.csv")) and not list(tmp_path.rglob("events.*"))
    assert "tensorboard" not in capsys.readouterr().out


@pytest.mark.parametrize(("engine", "option"), [("Threaded", "workers"), ("Vectorized", "clients")])
def test_an_engine_by_options(engine, option, fedlight, tmp_path):
    fedlight("fit", tmp_path, "--trainer.max_steps", "2", "--model.engine", engine, f"--model.engine.{option}", "2")
    assert summary(tmp_path)["rounds"] == 2
    kept = yaml.safe_load((last_run(tmp_path) / "config.yaml").read_text())["model"]["engine"]
    assert kept == {"class_path": f"fedlight.{engine}", "init_args": {option: 2}}


def test_without_an_engine_and_threads_both_are_chosen_and_kept(fedlight, tmp_path):
    before = torch.get_num_threads()
    fedlight("fit", tmp_path, "--trainer.max_steps", "2", "--model.engine", "null", "--model.codec", CODEC, "--baseline", "true")
    assert torch.get_num_threads() == before
    coded, plain = run_folders(tmp_path)
    figures = json.loads((coded / "summary.json").read_text())
    assert figures["engine"] in ("Sequential", "Threaded", "Vectorized") and figures["threads"] == before
    state = torch.load(coded / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["fedlight"]["engine"] == figures["engine"]
    kept = yaml.safe_load((plain / "config.yaml").read_text())
    assert kept["model"]["engine"]["class_path"] == f"fedlight.{figures['engine']}" and kept["threads"] == before


def test_callbacks_by_yaml(fedlight, tmp_path):
    config = {
        "trainer": {
            "max_steps": 30,
            "val_check_interval": 1,
            "callbacks": [
                {"class_path": "EarlyStopping", "init_args": {"monitor": "val/accuracy", "mode": "max", "patience": 1, "min_delta": 1.0}},
                {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "step"}},
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {"monitor": "val/loss", "filename": "mine-{step}", "save_top_k": 1, "dirpath": str(tmp_path / "mine")},
                },
                {"class_path": "fedlight.callbacks.UpdateRecorder", "init_args": {"clients": 2}},
            ],
        },
        "model": {
            "server_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
            "server_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fedlight("fit", tmp_path, "--config", str(tmp_path / "config.yaml"))
    rounds = summary(tmp_path)["rounds"]
    assert rounds < 30, "stopped early"
    assert [path.name.startswith("mine-step=") for path in (tmp_path / "mine").glob("*.ckpt")] == [True]
    with (last_run(tmp_path) / "metrics.csv").open() as file:
        rates = [float(row["lr-Adam"]) for row in csv.DictReader(file) if row.get("lr-Adam")]
    assert rates == pytest.approx([0.02 * 0.9**number for number in range(rounds)])
    assert (last_run(tmp_path) / "updates.safetensors").is_file()


def test_a_stop_by_time_is_enough(fedlight, tmp_path):
    fedlight("fit", tmp_path, "--trainer.max_time", "00:00:00:01")
    assert summary(tmp_path)["rounds"] > 0


# -- help --------------------------------------------------------------------------------------------------------------


def help_of(command: str, capsys, *more: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, *more, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_the_subcommands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("fit", "validate", "test", "predict", "pretrain", "compare", "audit"))


def options(text: str) -> dict[str, str]:
    """Return the help text of every option of ours, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        words = line.split()
        if words and words[0].startswith("--"):
            name = words[0].rstrip(",")
            found[name] = ""
            line = line.split("  ", 2)[-1] if line.strip().count("  ") else ""
            found[name] += " " + line.strip() if not line.strip().startswith("--") else ""
        elif name and words:
            found[name] += " " + line.strip()
        else:
            name = ""
    return {
        name: text
        for name, text in found.items()
        if name.startswith(("--model", "--data", "--pretraining", "--checkpoint", "--experiment", "--baseline"))
        and not name.endswith(".help")
    }


def test_help_has_no_lists_of_other_peoples_classes(capsys):
    text = help_of("fit", capsys)
    assert "known subclasses" not in text and len(text.splitlines()) < 900
    assert text.startswith("usage: ") and len(text.partition("\n\n")[0].splitlines()) == 1


@pytest.mark.parametrize("command", ["fit", "pretrain"])
def test_every_option_of_ours_is_explained_in_help(command, capsys):
    texts = options(help_of(command, capsys))
    assert {"--model.codec", "--data.num_clients", "--pretraining.proxy", "--checkpoint.every_n_rounds", "--baseline"} <= set(texts)
    config_files = {"--model", "--data", "--pretraining", "--checkpoint"}
    for name in set(texts) - config_files:
        text = texts[name].split("; default:")[0].split("(required")[0]
        assert len(text.split()) >= 3, f"{name} has no help: {texts[name]!r}"


@pytest.mark.quick(10)
@pytest.mark.parametrize(
    "option",
    [
        *(f"--model.codec.help={kind}" for kind in ("AutoencoderCodec", "QuantizeCodec", "ChainCodec", "LinearCodec")),
        *(f"--model.algorithm.help={kind}" for kind in ("FedAvg", "FedProx", "FedSGD", "FedNova", "FedDyn", "Ditto", "QFedAvg")),
        *(f"--model.privacy.help={kind}" for kind in ("CentralDP", "DistributedDP", "LocalDP")),
        *(f"--model.engine.help={kind}" for kind in ("Threaded", "Vectorized")),
        *(f"--data.source.help={kind}" for kind in ("Digits", "ArrayFile", "Torchvision", "WithClients")),
        *(f"--data.partitioner.help={kind}" for kind in ("Dirichlet", "IID")),
        *(f"--data.sampler.help={kind}" for kind in ("Uniform", "Poisson")),
        *(f"--model.network.help=fedlight.modules.{kind}" for kind in ("MLP", "LeNet5", "SmallCNN")),
        "--pretraining.proxy.help",
        "--pretraining.training.help",
    ],
)
def test_options_of_parts_are_explained(option, capsys):
    with pytest.raises(SystemExit):
        main(["fit", option])
    texts = options(capsys.readouterr().out)
    assert texts
    for name, text in texts.items():
        assert len(text.split("; default:")[0].split("(required")[0].split()) >= 2, f"{name} has no help: {text!r}"


LOCAL = {"lr", "batch_size", "epochs", "steps", "momentum", "weight_decay", "max_grad_norm", "schedule"}
TERMS = {"clip", "noise_multiplier", "target_epsilon", "delta", "accountant", "simulation_seed"}


@pytest.mark.parametrize(
    ("part", "kind", "names"),
    [
        ("algorithm", "FedProx", LOCAL | {"mu"}),
        ("algorithm", "FedNova", LOCAL),
        ("algorithm", "FedDyn", LOCAL - {"momentum"} | {"alpha"}),
        ("algorithm", "Ditto", LOCAL | {"lam"}),
        ("algorithm", "QFedAvg", LOCAL | {"q"}),
        ("privacy", "CentralDP", TERMS | {"adaptive", "adaptive.quantile", "adaptive.rate", "adaptive.bit_noise"}),
        ("privacy", "DistributedDP", TERMS - {"accountant"} | {"threshold", "colluding", "grid", "bits"}),
        ("privacy", "LocalDP", TERMS),
    ],
)
def test_options_that_a_part_hands_on_are_its_options(part, kind, names, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--model.{part}.help={kind}"])
    assert {name.removeprefix(f"--model.{part}.") for name in options(capsys.readouterr().out)} == names


def test_the_configuration_can_be_printed_and_read_back(finished, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(finished / "config.yaml"), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["codec"]["class_path"].endswith(ChainCodec.__name__)
    assert printed["trainer"]["max_steps"] == 6


@pytest.mark.slow
def test_the_console_script_runs(tmp_path):
    script = Path(sys.executable).with_name("fedlight")
    if not script.is_file():
        pytest.skip("no console script beside the interpreter: install the project")
    done = subprocess.run([script, "fit", "--help"], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--model.network" in done.stdout
