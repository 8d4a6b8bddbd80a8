"""Mistakes in values are refused with torch alone, before Lightning is imported; what is right passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlight.console.check import check
from fedlight.console.configs import shipped
from fedlight.console.values import try_values
from fedlight.core.errors import ConfigurationError, DataError
from tests.federation import CODEC, TINY, environment

DIGITS = ["fit", "--config", "digits"]

MISTAKES: dict[str, tuple[list[str], str]] = {
    "ratio": ([*DIGITS, "--model.codec.ratio", "-35"], "model.codec: Expected `ratio` >= 1 but got -35"),
    "text for a number": ([*DIGITS, "--model.codec.ratio", "1e-1"], "model.codec: Expected `ratio` >= 1 but got 0.1"),
    "batch size": ([*DIGITS, "--model.algorithm.batch_size", "0"], "model.algorithm: Expected `batch_size` >= 1"),
    "within a chain": (
        [
            *DIGITS,
            "--model.codec",
            json.dumps({"class_path": "ChainCodec", "init_args": {"codecs": [{"class_path": "QuantizeCodec", "init_args": {"bits": 99}}]}}),
        ],
        "codecs: .*bits",
    ),
    "cohort": ([*DIGITS, "--data.sampler.cohort_size", "50"], "data.sampler: .*at most 20, got 50"),
    "cohort of the usual 20 clients": (
        [
            "fit",
            "--data.sampler",
            "Uniform",
            "--data.sampler.cohort_size",
            "21",
            "--data.partitioner",
            "IID",
            "--model.network",
            "LeNet5",
            "--trainer.max_steps",
            "1",
        ],
        "at most 20, got 21",
    ),
    "threads": ([*DIGITS, "--threads", "0"], "`threads` >= 1 but got 0"),
    "epochs": ([*DIGITS, "--trainer.max_epochs", "5"], "no `trainer.max_epochs` beside `trainer.max_steps` 100 but got 5: .* one endless"),
    "clipping": ([*DIGITS, "--trainer.gradient_clip_val", "1"], "no `trainer.gradient_clip_val` but got 1.*max_grad_norm"),
    "checkpoint": (["test", "--config", "digits", "--ckpt_path", "last.ckpt"], "no file last.ckpt"),
    "damaged checkpoint": ([*DIGITS, "--ckpt_path", "damaged.ckpt"], "damaged or none"),
    "own class that fails": ([*DIGITS, "--model.codec", "fails.Mine"], "fails.Mine cannot be imported: ModuleNotFoundError"),
    "own network that fails": ([*DIGITS, "--model.network", "fails.Mine"], "fails.Mine cannot be imported: ModuleNotFoundError"),
    "own class of another kind": ([*DIGITS, "--model.codec", "plain.Mine"], "plain.Mine is no Codec.*fedlight.Codec"),
    "class of torch's": ([*DIGITS, "--model.codec", "torch.nn.Linear"], "torch.nn.Linear is no Codec"),
    "file of data": ([*DIGITS, "--data.source", "ArrayFile", "--data.source.path", "none.npz"], "data.source: .*none.npz: no such file"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails.py").write_text("import nowhere_to_be_found\nclass Mine: ...\n")
    (tmp_path / "plain.py").write_text("class Mine: ...\n")
    (tmp_path / "damaged.ckpt").write_text("no checkpoint")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_value_is_a_sentence_that_names_the_option(name: str) -> None:
    args, message = MISTAKES[name]
    check(args)
    with pytest.raises((ConfigurationError, DataError), match=message) as refused:
        try_values(args)
    assert "\n" not in str(refused.value)


RIGHT = [
    *([kind, "--config", name] for name in shipped() for kind in ("fit", "pretrain") if name.partition("_")[0] not in ("compare", "audit")),
    ["fit", *TINY, "--model.codec", CODEC],
    [*DIGITS, "--model.codec", "null", "--data.sampler.cohort_size", "50", "--data.num_clients", "100"],
    [*DIGITS, "--model.codec.ratio", "1e1", "--model.algorithm.schedule", "Cosine", "--model.algorithm.schedule.rounds", "10"],
    [*DIGITS, "--model.codec", "TopKCodec", "--model.codec.help"],
    [*DIGITS, "--data.sampler.cohort_size", "50", "--data.partitioner", "Natural", "--data.num_clients", "null"],
    ["compare", "--config", "compare_digits"],
    ["configs"],
    [],
]


@pytest.mark.parametrize("args", RIGHT, ids=range(len(RIGHT)))
def test_what_is_right_passes(args: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cifar10_20k.npz", "mnist_writers.npz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("FEDLIGHT_DATA", str(tmp_path))
    try_values(args)


def test_lightning_is_not_imported_for_it() -> None:
    code = (
        "import sys\nfrom fedlight.console.values import prepare\n"
        "try: prepare('fit --config digits --model.codec.ratio -1'.split())\n"
        "except ValueError as error: print(error, {'lightning', 'torchvision', 'torchmetrics', 'jsonargparse'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "model.codec: Expected `ratio` >= 1 but got -1 set()"
