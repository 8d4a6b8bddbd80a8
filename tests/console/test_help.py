"""Help and completion: read from the sources, complete, without torch or Lightning."""

from __future__ import annotations

import inspect
import shlex
import shutil
import subprocess
import sys

import pytest

import fedlight
from fedlight.cli import FederatedCLI
from fedlight.console import catalogue
from fedlight.console.completion import script
from fedlight.console.help import asked_for, groups, of_class, of_subcommand
from fedlight.console.options import RUNS, SETTINGS, all_options, annotation_of
from fedlight.core.errors import ConfigurationError
from tests.federation import environment

PARTS = ["model.network", "model.algorithm", "model.privacy", "data.partitioner", "data.source", "model.engine", "trainer.callbacks"]
HIDDEN = {"weights_only", "return_predictions", "optimizer", "lr_scheduler", "model.seed", "data.seed"}
GROUPS = {"model", "data", "trainer", "pretraining", "checkpoint"}


def is_configurable(name: str) -> bool:
    found = catalogue.classes().get(name)
    return found is not None and not found.abstract and not name.endswith("Error") and catalogue.arguments(name) is not None


@pytest.mark.parametrize("subcommand", RUNS)
def test_the_help_has_every_option_with_a_sentence(subcommand):
    shown = dict(option for _, group in groups(subcommand) for option in group)
    assert {name for name in shown if name.count(".") < 2} - {"print_config"} == {*all_options(subcommand)} - HIDDEN - GROUPS
    assert {name for name, one in shown.items() if not one.meaning} == set()
    text = of_subcommand(subcommand)
    assert [name for name in shown if f"  --{name}" not in text] == []


@pytest.mark.parametrize("name", [name for name in fedlight.__all__ if is_configurable(name)])
def test_arguments_and_defaults_are_those_of_the_class(name):
    shown = dict(of_class(catalogue.classes()[name], ""))
    known = inspect.signature(getattr(fedlight, name)).parameters
    plain = {one.name for one in known.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    assert {one for one in shown if "." not in one} <= plain or any(one.kind == one.VAR_KEYWORD for one in known.values())
    assert not {one for one in plain - {*shown} if not any(other.startswith(f"{one}.") for other in shown)}
    words = {None: "null", True: "true", False: "false"}
    for one, option in ((one, option) for one, option in shown.items() if one in known):
        if option.default.startswith("default: "):
            value = known[one].default
            assert option.default == f"default: {words.get(value, value) if value is None or isinstance(value, bool) else value}"
        elif option.default == "required":
            assert known[one].default is inspect.Parameter.empty


@pytest.mark.parametrize("words", ["fit --help", "compare -h", "fit --model.codec.help TransformCodec", "completion bash"])
def test_neither_needs_torch_or_lightning(words):
    code = (
        f"import sys; sys.argv = ['fedlight', *{words.split()!r}]; from fedlight.usage import main\ntry: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print('imported:', *{'torch', 'lightning', 'numpy', 'jsonargparse', 'fedlight.cli'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300, check=True)
    assert len(done.stdout.splitlines()) > 10 and done.stdout.endswith("imported:\n"), done.stdout[-200:]


def test_whoever_reads_on_may_stop():
    code = "import sys; sys.argv = ['fedlight', 'fit', '--help']; from fedlight.usage import main; main()"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | true"
    assert not subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, timeout=300).stderr


def test_choices_are_listed_with_a_line_each():
    listed = asked_for(["fit", "--model.codec.help"])
    assert listed is not None
    for name in ("TransformCodec", "IdentityCodec", "QSGDCodec"):
        line = next(line for line in listed.splitlines() if line.startswith(f"{name} "))
        assert len(line.split()) > 4
    assert asked_for(["fit", "--model.codec", "TransformCodec"]) is None
    assert asked_for([]) is None
    with pytest.raises(ConfigurationError, match="no Transform; did you mean TransformCodec"):
        asked_for(["fit", "--model.codec.help", "Transform"])


@pytest.mark.parametrize("part", PARTS)
def test_every_part_lists_its_choices(part):
    listed = asked_for(["fit", f"--{part}.help"])
    assert listed is not None and len(listed.splitlines()) > 5


def test_options_of_one_class():
    for words in (["--model.codec.help=TransformCodec"], ["--model.codec.help", "fedlight.TransformCodec"]):
        assert "  --model.codec.ratio " in str(asked_for(["fit", *words]))
    assert "--trainer.callbacks.patience" in str(asked_for(["fit", "--trainer.callbacks.help", "EarlyStopping"]))
    assert asked_for(["fit", "--model.network.help", "torch.nn.Linear"]) is None, "the parser imports it"
    assert asked_for(["fit", "--model.codec.help", "mine.TransformCodec"]) is None


def test_what_a_class_gives_its_base_itself_is_no_argument():
    assert {"alpha", "lr"} <= {*(catalogue.arguments("FedDyn") or {})}
    assert not {"mu", "momentum"} & {*(catalogue.arguments("FedDyn") or {})}


def test_the_annotation_of_an_option():
    assert annotation_of("fit", "model.codec") == "Codec | None"
    assert annotation_of("fit", "model.codek") is None
    assert {*FederatedCLI.subcommands()} == {*RUNS}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("re", {"report"}),
        ("fit --model.code", {"--model.codec", "--model.codec_path"}),
        ("fit --model.codec Top", {"TopKCodec"}),
        ("fit --config dig", {"digits"}),
        ("audit --config audit_m", {"audit_mnist"}),
        ("configs compare_di", {"compare_digits"}),
        ("fit --trainer.max_steps 1", set()),
        *((f"{what} --conf", {"--config"}) for what in (*RUNS, *SETTINGS)),
    ],
)
def test_bash_completes(typed, offered):
    words = ["fedlight", *typed.split()]
    code = f'{script("bash")}\nCOMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _fedlight; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {*done.stdout.split()} == offered
