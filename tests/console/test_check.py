"""A mistake that shows in names and values is one sentence, before torch or Lightning is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from fedlight.cli import DryRun, open_cli
from fedlight.console import catalogue
from fedlight.console.check import check
from fedlight.console.configs import shipped
from fedlight.console.names import USUAL
from fedlight.console.options import all_options, annotation_of, options
from fedlight.core.errors import ConfigurationError
from tests.federation import CODEC, TINY, environment

DIGITS = ["fit", "--config", "digits"]


def callbacks(name: str, **arguments) -> list[str]:
    return ["--trainer.callbacks", json.dumps([{"class_path": name, "init_args": arguments}])]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "subcommand": (["fitt"], "no subcommand fitt; did you mean fit?"),
    "no rounds": ([*DIGITS, "--trainer.max_steps", "-1"], "`trainer.max_steps` .the number of rounds. but it is not set"),
    "option": ([*DIGITS, "--model.codek", "IdentityCodec"], "no option model.codek; did you mean model.codec?"),
    "option of another subcommand": ([*DIGITS, "--cohort_rounds", "1"], "no option cohort_rounds"),
    "Trainer's option": ([*DIGITS, "--trainer.max_step", "1"], "no option trainer.max_step; did you mean trainer.max_steps?"),
    "codec": ([*DIGITS, "--model.codec", "TransfromCodec"], "no codec TransfromCodec; did you mean TransformCodec?"),
    "rounds": ([*DIGITS, "--rounds", "5"], "no option rounds; did you mean trainer.max_steps?"),
    "seed": ([*DIGITS, "--seed", "5"], "no option seed; did you mean seed_everything?"),
    "torchvision's data": (
        [*DIGITS, "--data.source", "mnist"],
        "no source mnist, but torchvision has it: use Torchvision with `dataset: MNIST`",
    ),
    "codec in a chain": (
        [*DIGITS, "--model.codec", json.dumps({"class_path": "ChainCodec", "init_args": {"codecs": [{"class_path": "LinarCodec"}]}})],
        "no codec LinarCodec; did you mean LinearCodec?",
    ),
    "codec's argument": ([*DIGITS, "--model.codec.ration", "4"], "TransformCodec has no argument ration; did you mean ratio?"),
    "argument of another codec": ([*DIGITS, "--model.codec", "QuantizeCodec", "--model.codec.ratio", "4"], "QuantizeCodec has no argument"),
    "network": ([*DIGITS, "--model.network", "fedlight.modules.MPL"], "no MPL in fedlight.modules; did you mean MLP?"),
    "network without its path": ([*DIGITS, "--model.network", "MPL"], "no class MPL; did you mean MLP?"),
    "class of one's own": ([*DIGITS, "--model.network", "nowhere.Net"], "no module nowhere for nowhere.Net.*current folder"),
    "optimizer": ([*DIGITS, "--model.server_optimizer", "torch.optim.SDG"], "no SDG in torch.optim; did you mean SGD?"),
    "algorithm": ([*DIGITS, "--model.algorithm", "FedProxx"], "no algorithm FedProxx; did you mean FedProx?"),
    "callback": ([*DIGITS, "--trainer.callbacks", "EarlyStoping"], "no callback EarlyStoping; did you mean EarlyStopping?"),
    "callback's argument": ([*DIGITS, *callbacks("EarlyStopping", monitr="x")], "EarlyStopping has no argument monitr; did you mean"),
    "missing argument": ([*DIGITS, *callbacks("EarlyStopping")], "EarlyStopping needs monitor"),
    "monitor": ([*DIGITS, *callbacks("EarlyStopping", monitor="val/acuracy")], "no metric val/acuracy.*did you mean val/accuracy?"),
    "whole number": ([*DIGITS, "--trainer.max_steps", "ten"], "trainer.max_steps to be a whole number but got ten"),
    "number of a codec": ([*DIGITS, "--model.codec.ratio", "much"], "model.codec.ratio to be a number but got much"),
    "true or false": ([*DIGITS, "--baseline", "maybe"], "baseline to be true or false but got maybe"),
    "choice": ([*DIGITS, "--model.weighting", "sample"], "one of equal, samples but got sample; did you mean samples?"),
    "configuration": (["fit", "--config", "digitz"], "did you mean digits?"),
    "file of options": ([*DIGITS, "--data", "nofile.yaml"], "no file nofile.yaml"),
    "no value": ([*DIGITS, "--trainer.max_steps"], "value after --trainer.max_steps"),
    "no option": ([*DIGITS, "digits"], "options after `fit` but got digits"),
    "no network": (["fit"], "Expected model.network but got none.*--config digits"),
    "accelerator": ([*DIGITS, "--trainer.accelerator", "gpuu"], "trainer.accelerator to be one of .*did you mean gpu?"),
    "no checkpoint to test": (["test", "--config", "digits"], "Expected `ckpt_path` for `test` but got none"),
    "no checkpoint to predict": (["predict", "--config", "digits"], "Expected `ckpt_path` for `predict`"),
    "comparison": (["compare", "--config", "compare_digits", "--seds", "[1]"], "no option seds; did you mean seeds?"),
    "audit": (["audit", "--config", "audit_digits", "--fast", "quite"], "fast to be true or false"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_usual_word_is_no_option_and_stands_for_one():
    for word, meant in USUAL.items():
        assert word not in options("fit")
        for name in re.findall(r"[\w.]+\.\w+|^\w+$", meant):
            known = name.startswith("model.algorithm.") and name.rpartition(".")[2] in catalogue.arguments("FedAvg")
            known |= name == "data.sampler.cohort_size" and "cohort_size" in catalogue.arguments("Uniform")
            assert known or annotation_of("fit", name) is not None


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence(name):
    args, message = MISTAKES[name]
    with pytest.raises(ConfigurationError, match=message) as refused:
        check(args)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["model:\n  codek: 1\n", "modl: {}\n", "- a list\n", "model: [unclosed\n"])
def test_a_mistake_in_a_file_names_the_file(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"mine\.yaml"):
        check(["fit", "--config", "mine.yaml"])


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_pass(name):
    kind = name.partition("_")[0]
    check([kind if kind in ("compare", "audit") else "fit", "--config", name])


RIGHT = [
    [*DIGITS, "--model.codec", "null", "--trainer.max_epochs", "-1", "--trainer.devices", "2", "--model.sim_every=0"],
    [*DIGITS, "--model.server_optimizer", "Adam", "--model.server_optimizer.lr", "0.1", "--model.loss", "CrossEntropyLoss"],
    [*DIGITS, "--model.server_optimizer", "fedlight.servers.FedAdam", "--data.source", "Torchvision", "--data.source.dataset", "MNIST"],
    [*DIGITS, "--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy", "--trainer.logger", "false"],
    [*DIGITS, *callbacks("fedlight.callbacks.UpdateRecorder", clients=2), "--model.codec.init_args.ratio", "1e1"],
    [*DIGITS, "--model.algorithm", "FedProx", "--model.algorithm.mu", "0.1", "--model.algorithm.schedule", "Constant"],
    ["fit", *TINY, "--model.codec", CODEC, "--pretraining.proxy.alpha", "0.3", "--print_config"],
    ["fit", "--config", json.dumps({"model": {"network": {"class_path": "tests.own.LitClassifier"}}, "trainer": {"max_steps": 2}})],
    ["test", "--config", "digits", "--ckpt_path", "some.ckpt"],
    ["--config", "digits", "fit"],
]


@pytest.mark.parametrize("args", RIGHT, ids=range(len(RIGHT)))
def test_what_is_right_passes(args):
    check(args)


@pytest.mark.parametrize("subcommand", ["fit", "test", "predict", "pretrain"])
def test_the_options_are_those_of_the_parser(subcommand):
    """So that the two cannot drift apart."""

    class Parser(DryRun):
        def parse_arguments(self, parser, args) -> None:
            found.update(action.dest for action in self._subcommand_parsers[subcommand]._actions)
            raise InterruptedError

    found: set[str] = set()
    with pytest.raises(InterruptedError):
        open_cli(Parser, [subcommand, *TINY])
    found = {name for name in found if not name.endswith(("help", "print_config", "print_shtab")) and name.count(".") < 2}
    known = {*all_options(subcommand)} - {"optimizer", "lr_scheduler"}
    assert known == found


def test_the_families_are_what_importing_finds():
    import inspect

    import fedlight

    for base in ("Codec", "Algorithm", "Partitioner", "DataSource", "Availability", "Engine"):
        root = getattr(fedlight, base)
        kinds = {name for name in fedlight.__all__ if inspect.isclass(found := getattr(fedlight, name)) and issubclass(found, root)}
        assert {*catalogue.family(base)} == {name for name in kinds if not inspect.isabstract(getattr(fedlight, name))}


@pytest.mark.parametrize("name", ["codec", "monitor", "network", "no checkpoint to test"])
def test_the_command_ends_with_the_sentence_alone_and_status_2(name):
    args, _ = MISTAKES[name]
    code = (
        f"import sys; sys.argv = ['fedlight', *{args!r}]\nfrom fedlight.usage import main\ntry: main()\n"
        "except SystemExit as stopped: print(stopped.code, sorted({'torch', 'lightning', 'jsonargparse'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "2 []"
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedlight: error: ")
