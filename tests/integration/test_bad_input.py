"""A mistake ends the command line before training, with one readable sentence, exit status 2, no traceback and nothing lost on disk."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from fedlight.callbacks import FederatedCallback
from fedlight.codecs.identity import IdentityCodec, IdentityDecoder, IdentityEncoder
from fedlight.core.checkpoint import read_checkpoint, write_checkpoint
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.export import save_codec
from fedlight.core.wire import CodeFormat
from fedlight.modules.checkpoints import CLIENTS, CheckpointFiles
from tests.federation import CODEC, federated, federated_data, invoke, learned, mlp, pretraining, run, run_folders, trainer, write_npz
from tests.processes import fork

ROUND = ["--trainer.max_steps", "1"]
ALGORITHM = "--model.algorithm"
NPZ = ["--data.source", "ArrayFile", "--data.source.init_args.path"]


def codec(name: str, **arguments) -> list[str]:
    return ["--model.codec", json.dumps({"class_path": name, "init_args": arguments})]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "more clients than samples": (["--data.num_clients", "5000"], "more clients than samples.*set num_clients to .* or less"),
    "no clients": (["--data.num_clients", "0"], "num_clients: expected at least 1, got 0"),
    "cohort larger than the population": (["--data.sampler.cohort_size", "7"], "expected at most 6, got 7.*lower cohort_size"),
    "empty cohort": (["--data.sampler.cohort_size", "0"], "cohort_size: expected at least 1, got 0"),
    "Dirichlet alpha 0": (["--data.partitioner", "Dirichlet", "--data.partitioner.alpha", "0"], "alpha.*got 0"),
    "Dirichlet alpha below 0": (["--data.partitioner", "Dirichlet", "--data.partitioner.alpha", "-1"], "alpha.*got -1"),
    "missing file": ([*NPZ, "FOLDER/absent.npz"], "absent.npz: no such file.*Correct the path"),
    "corrupt file": ([*NPZ, "FOLDER/corrupt.npz"], "corrupt.npz: cannot be read as an .npz"),
    "cut file": ([*NPZ, "FOLDER/cut.npz"], "cut.npz: cannot be read as an .npz"),
    "pickled file": ([*NPZ, "FOLDER/pickled.npz"], "pickled.npz: .*no objects"),
    "missing array": ([*NPZ, "FOLDER/partial.npz"], "missing array y_test"),
    "labels out of range": ([*NPZ, "FOLDER/labels.npz", "--data.source.init_args.num_classes", "3"], "labels out of range: .*0..2"),
    "NaN in the file": ([*NPZ, "FOLDER/nan.npz"], "expected finite values"),
    "unknown data set": (["--data.source", "Torchvision", "--data.source.dataset", "MNISTT"], "'MNISTT'; did you mean .*MNIST"),
    "no proxy data": (
        [*codec("AutoencoderCodec"), "--data.proxy_samples", "0", "--data.val_fraction", "0.1"],
        "proxy data.*data.proxy_samples",
    ),
    "ratio below 1": (codec("AutoencoderCodec", ratio=0.5), "`ratio` >= 1 but got 0.5"),
    "bits out of range": (codec("QuantizeCodec", bits=1), "`bits` in 2..16.*got 1"),
    "gradient_clip_val": (["--trainer.gradient_clip_val", "1"], "no `trainer.gradient_clip_val` but got 1.*max_grad_norm"),
    "accumulate_grad_batches": (["--trainer.accumulate_grad_batches", "2"], "`trainer.accumulate_grad_batches` 1 but got 2.*batch_size"),
    "half precision": (["--trainer.precision", "16-true"], "`trainer.precision` 32-true.*got 16-true"),
    "double precision": (["--trainer.precision", "64-true"], "`trainer.precision` 32-true.*got 64-true"),
    "no number of rounds": (["--trainer.max_steps", "-1"], "it is not set.*--trainer.max_steps 100`, or `Trainer\\(max_steps=100"),
    "epochs for rounds": (["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"], "`trainer.max_steps`"),
    "batch size 0": ([ALGORITHM, "FedAvg", f"{ALGORITHM}.steps", "1", f"{ALGORITHM}.batch_size", "0"], "`batch_size` >= 1 but got 0"),
    "epochs and steps": (
        [ALGORITHM, "FedAvg", f"{ALGORITHM}.steps", "1", f"{ALGORITHM}.epochs", "1"],
        "exactly one of `epochs` and `steps`",
    ),
    "neither epochs nor steps": ([ALGORITHM, "FedAvg"], "exactly one of `epochs` and `steps`"),
    "learning rate 0": ([ALGORITHM, "FedAvg", f"{ALGORITHM}.steps", "1", f"{ALGORITHM}.lr", "0"], "`lr` > 0"),
    "a network for other inputs": (["--model.network.in_features", "65"], r"takes inputs \[1, 1, 8, 8\]"),
    "too few classes": (["--model.network.num_classes", "9"], r"10 classes.*number of classes"),
    "min_clients 0": (["--model.min_clients", "0"], "`min_clients` >= 1"),
    "every_n_rounds 0": (["--checkpoint.every_n_rounds", "0"], "`every_n_rounds` >= 1 but got 0"),
    "too few recorded rounds": (["--pretraining.proxy.rounds", "2"], "`rounds` >= 6.*got 2"),
    "no codec at the path": (["--model.codec_path", "FOLDER/nowhere"], "could not read"),
    "a codec for another model": (["--model.codec_path", "FOLDER/codec"], "made for another model.*fedlight pretrain"),
    "a misspelt option": (["--model.codek", "IdentityCodec"], "codek"),
    "a misspelt class": (["--model.codec", "AutoencoderKodec"], "AutoencoderKodec"),
    "all clients lost": ([ALGORITHM, "FedAvg", f"{ALGORITHM}.steps", "5", f"{ALGORITHM}.lr", "1e38"], "no usable aggregate.*learning rate"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "corrupt.npz").write_bytes(b"PK\x03\x04 but nothing after it")
    write_npz(folder / "labels.npz")
    whole = (folder / "labels.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    write_npz(folder / "pickled.npz", y_train=np.array([{}] * 120, dtype=object))
    np.savez(folder / "partial.npz", x_train=np.zeros((4, 2)), y_train=np.zeros(4, int), x_test=np.zeros((2, 2)))
    write_npz(folder / "nan.npz", x_train=np.full((120, 64), np.nan, dtype=np.float32), x_test=np.zeros((40, 64), np.float32))
    module = federated(codec=learned())
    run(module, 1)
    save_codec(module.codec, folder / "codec")
    return folder


@pytest.mark.quick(12)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_a_sentence_and_status_2(name, files, fedlight, tmp_path, capfd):
    options, message = MISTAKES[name]
    options = [option.replace("FOLDER", str(files)) for option in options]
    with pytest.raises(SystemExit) as stopped:
        fedlight("fit", tmp_path, *ROUND, *options)
    errors = capfd.readouterr().err
    assert stopped.value.code == 2, errors
    assert "Traceback" not in errors
    assert re.search(message, " ".join(errors.split())), errors
    assert not list(tmp_path.rglob("*.ckpt")) or name == "all clients lost", "training had started"
    assert not list(tmp_path.rglob("model.safetensors"))


def test_the_message_is_one_line_that_a_terminal_shows(files, fedlight, tmp_path, capfd):
    with pytest.raises(SystemExit):
        fedlight("fit", tmp_path, *ROUND, "--data.num_clients", "5000")
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fedlight: error: num_clients: more clients than samples")


def test_an_earlier_run_is_left_alone(fedlight, tmp_path):
    fedlight("fit", tmp_path, *ROUND)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        fedlight("fit", tmp_path, *ROUND, "--data.sampler.cohort_size", "7")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_checkpoint_of_another_configuration_is_refused_by_name(finished, fedlight, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        fedlight(
            "fit", tmp_path, "--trainer.max_steps", "8", "--model.codec", CODEC, "--ckpt_path", str(finished / "checkpoints" / "last.ckpt")
        )
    assert stopped.value.code == 2
    assert "differs in: data and partition" in capfd.readouterr().err  # the finished run held out clients' samples


def test_a_damaged_checkpoint_is_refused(finished, fedlight, tmp_path, capfd):
    (tmp_path / "cut.ckpt").write_bytes((finished / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(SystemExit) as stopped:
        fedlight("fit", tmp_path, "--trainer.max_steps", "8", "--ckpt_path", str(tmp_path / "cut.ckpt"))
    assert stopped.value.code == 2
    errors = capfd.readouterr().err
    assert "cut.ckpt" in errors and "Traceback" not in errors


def test_a_missing_checkpoint_is_refused(fedlight, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        fedlight("fit", tmp_path, "--trainer.max_steps", "8", "--ckpt_path", str(tmp_path / "absent.ckpt"))
    assert stopped.value.code == 2
    errors = capfd.readouterr().err
    assert "absent.ckpt" in errors and "Traceback" not in errors


def test_mixed_half_precision_is_refused():
    """On a CPU Lightning itself makes bf16 of it, so the Trainer of a GPU is imitated."""
    runner = trainer(1)
    runner.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ConfigurationError, match=r"`trainer.precision` 32-true or bf16-mixed but got 16-mixed"):
        runner.fit(federated(), datamodule=federated_data())


def test_the_same_errors_in_python():
    with pytest.raises(ConfigurationError, match="gradient_clip_val"):
        trainer(1, gradient_clip_val=1.0).fit(federated(), datamodule=None)


def test_a_code_longer_than_the_update_is_refused_in_python():
    class Long(IdentityCodec):
        def make_encoder(self, layout, plan):
            return IdentityEncoder(layout, CodeFormat(layout.dim + 1))

        def make_decoder(self, layout, plan):
            return IdentityDecoder(layout, CodeFormat(layout.dim + 1))

    with pytest.raises(ConfigurationError, match="Expected a code no longer than the update .* makes one of"):
        run(federated(codec=Long()), 1)


def test_a_codec_of_another_model_is_refused_before_training(files):
    module = federated(mlp(hidden=9), codec_path=str(files / "codec"))
    with pytest.raises(CodecMismatchError, match="made for another model"):
        trainer(1, callbacks=[pretraining()]).fit(module, datamodule=federated_data())


def damaged(finished: Path, place: Path, how: str) -> Path:
    """Return a checkpoint of the finished run without one of its keys, or with an object that only running code can load."""
    checkpoint = read_checkpoint(finished / "checkpoints" / "last.ckpt")
    (clients,) = (finished / "checkpoints").glob("last.*.clients.keep-secret")
    (place.parent / clients.name).write_bytes(clients.read_bytes())
    if how == "pickled":
        checkpoint["extra"] = Path("an object")
    else:
        *outer, last = how.split(".")
        inner = checkpoint
        for key in outer:
            inner = inner[key]
        del inner[last]
    write_checkpoint(place, checkpoint)
    return place


@pytest.mark.parametrize("how", ["pickled", "loops", "loops.fit_loop", "fedlight.server", "fedlight.privacy"])
def test_a_checkpoint_with_objects_or_without_a_key_is_refused(fedlight, finished, tmp_path, capsys, how):
    path, same = damaged(finished, tmp_path / "damaged.ckpt", how), ["--model.codec", CODEC, "--data.client_holdout", "0.2"]
    with pytest.raises(SystemExit) as ended:
        fedlight("fit", tmp_path, *same, "--trainer.max_steps", "8", "--ckpt_path", str(path))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert re.search("other objects, whose loading could run code" if how == "pickled" else f"lacks .*{how.split('.')[-1]}", said), said


def test_a_checkpoint_at_a_url_is_refused(fedlight, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        fedlight("fit", tmp_path, *ROUND, "--ckpt_path", "https://example.org/last.ckpt")
    assert ended.value.code == 2 and "`ckpt_path` to be a file but got https" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "room", "said"),
    [(resource.RLIMIT_FSIZE, 40_000, "File too large"), (resource.RLIMIT_NOFILE, 0, "Too many open files")],
    ids=["no room for larger files, as on a full disk", "no more open files"],
)
def test_a_limit_of_the_system_ends_in_a_sentence_and_loses_nothing(limit, room, said, tmp_path):
    """Real limits of a real process, set when its rounds begin."""

    def run() -> None:
        many = ["--trainer.max_steps", "1000", "--checkpoint.every_n_rounds", "1"]
        invoke("fit", tmp_path, *many, "--trainer.callbacks", f"{__name__}.Limited", *(f"--trainer.callbacks.{n}={v}" for n, v in given))

    given = (("limit", limit), ("room", room))
    process = fork(run, tmp_path / "output.txt")
    assert process.wait() == 2, process.last_words()
    assert f"fedlight: error: The system does not let the run go on: {said}" in process.last_words()
    assert "Traceback" not in process.last_words()
    (folder,) = run_folders(tmp_path)
    files = CheckpointFiles().load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert files["global_step"] >= 3 and CLIENTS in files
    assert len(list((folder / "checkpoints").glob("last.*"))) == 2 and not list(tmp_path.rglob("*.tmp"))


class Limited(FederatedCallback):
    """Limits the process after three rounds: the size of its files, or how many more of them it may have open."""

    def __init__(self, limit: int, room: int) -> None:
        self.limit, self.room = limit, room

    def on_round_end(self, trainer, pl_module, round):
        if round.context.round == 3:
            first = os.dup(0)  # the lowest number that is free
            os.close(first)
            opened = first if self.limit == resource.RLIMIT_NOFILE else 0
            resource.setrlimit(self.limit, (opened + self.room, resource.getrlimit(self.limit)[1]))


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(fedlight, tmp_path, capsys):
    """A file in the way stands for a read-only folder, which some users may write to; a folder of the system is one that nobody may."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as ended:
        fedlight("fit", tmp_path, *ROUND, "--checkpoint.dirpath", str(tmp_path / "taken" / "checkpoints"))
    assert ended.value.code == 2 and "The system does not let the run go on: Not a directory" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(SystemExit) as ended:
        fedlight("fit", Path("/sys/fedlight" if Path("/sys").is_dir() else "/dev/null/fedlight"), *ROUND)
    assert ended.value.code == 2 and "The system does not let the run go on" in capsys.readouterr().err
