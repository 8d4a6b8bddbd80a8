"""Mistakes in arguments and configuration files that show before anything is imported: misspelt names, wrong kinds of values."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlight.console import catalogue
from fedlight.console.arguments import Tree, read
from fedlight.console.catalogue import Arguments, exists, lightning_classes, names_in
from fedlight.console.configs import require_command, shipped
from fedlight.console.names import did_you_mean, did_you_mean_option
from fedlight.console.options import LIGHTNINGS, SETTINGS, annotation_of, group, options
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.flags import NO_ROUNDS
from fedlight.core.metric_names import metric_names
from fedlight.subcommands import SUBCOMMANDS

_NUMBERS = {"int": int, "float": float}
_ENDS = ("max_time", "limit_train_batches", "fast_dev_run", "callbacks")  # what may end a run beside a number of rounds
_OTHERS = ("torch.nn", "torch.optim", "torchvision.models", "torchmetrics")  # packages whose classes may be named without their path
_DEVICES = ("nvidia*", "kfd", "dxg")  # of GPUs: NVIDIA's, AMD's, and within Windows
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "neptune"}


def check(args: Sequence[str]) -> None:
    """Refuse arguments of `fedlight` with a mistake that needs no import of torch or Lightning to be seen.

    What is not refused may still be wrong: the parser knows every type.
    """
    subcommand = args[0] if args else ""
    if subcommand.partition("=")[0] in ("--print_shtab", "--print_completion"):
        raise ConfigurationError(f"There is no option {subcommand}: `fedlight completion bash` writes a script for the shell")
    if subcommand.startswith("-"):
        return
    if subcommand not in SUBCOMMANDS:
        raise ConfigurationError(f"There is no subcommand {subcommand}{did_you_mean(subcommand, SUBCOMMANDS)} (fedlight --help)")
    given = read(args[1:])
    scope = options(subcommand)
    if scope is None or given.asks_for_help:
        return
    if given.loose:
        raise ConfigurationError(f"Expected options after `{subcommand}` but got {given.loose[0]}: options begin with --")
    for name in given.missing:
        require("bool" in (annotation_of(subcommand, name) or "bool"), f"Expected a value after --{name} but got none")
    for path, tree in given.files:
        require_command(path, subcommand, SETTINGS)
        _Checker(f" in {path.name}").keys(scope, tree, "")
    tree = given.tree()
    _Checker("").keys(scope, tree, "")
    if subcommand in SETTINGS:
        check_settings(subcommand, tree)
    else:
        check_run(subcommand, tree)


class _Checker:
    """Walks a tree of settings, which come from ``where``, and refuses the first mistake; ``whole`` if nothing is added from elsewhere."""

    def __init__(self, where: str, whole: bool = False) -> None:
        self.where = where
        self.whole = whole

    def keys(self, scope: Arguments, tree: Tree, path: str) -> None:
        """Check the settings of one level, of which ``scope`` are the possible ones."""
        for key, value in tree.items():
            name = str(key).rstrip("+")
            if name not in scope or (not path and name == "config" and self.where):
                of_run = not path and "trainer" in scope
                near = (did_you_mean_option if of_run else did_you_mean)(path + name, [path + one for one in scope])
                raise ConfigurationError(f"There is no option {path}{name}{self.where}{near}")
            self.value(scope[name], value, path + name)

    def value(self, annotation: str, value: Any, path: str) -> None:
        """Check one setting."""
        if value is None:
            return
        if annotation.startswith("@"):
            inside = group(annotation)
            if isinstance(value, str) and "{" not in value:
                require(Path(value).is_file(), f"Expected {path} to be a file with its options but there is no file {value}{self.where}")
            if inside is not None and isinstance(value, dict):
                self.keys(inside, value, f"{path}.")
            return
        name = path.removeprefix("trainer.")
        if path.startswith("trainer.") and name in LIGHTNINGS:
            known = {**lightning_classes(name), **catalogue.family(LIGHTNINGS[name])}
            self._each(value, path, name.removesuffix("s"), known, None if name == "callbacks" else ("true", "false"))
            return
        bases = [one for one in re.findall(r"\b[A-Z]\w+", annotation) if one in catalogue.classes()]
        if bases:
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, (int, float)) and not isinstance(one, bool) and not re.search(r"\b(int|float)\b", annotation):
                    raise ConfigurationError(f"Expected {path} to name a class but got {value}{self.where}")
            self._of_family(bases[0], value, path)
        elif "Module" in annotation or "Callable" in annotation or "Metric" in annotation:
            self._each(value, path, path.rpartition(".")[2], None, None)
        else:
            self._plain(annotation, value, path)

    def _of_family(self, base: str, value: Any, path: str) -> None:
        one_class = not catalogue.classes()[base].abstract if self.whole else set(catalogue.family(base)) <= {base}
        if one_class and not (isinstance(value, dict) and "class_path" in value):
            inside = catalogue.arguments(base)  # a group of options, not a choice of classes
            if isinstance(value, dict) and inside is not None:
                self.keys(inside, value, f"{path}.")
            return
        kind = base.lower() if base in ("Codec", "Algorithm", "Engine", "Aggregator", "Partitioner") else path.rpartition(".")[2]
        self._each(value, path, kind, {name: found for name, found in catalogue.classes().items() if catalogue.is_a(name, base)}, None)

    def _each(self, value: Any, path: str, kind: str, known: dict[str, catalogue.Class] | None, others: Iterable[str] | None) -> None:
        """Check the class that a value names, or the classes in a list, and their arguments."""
        if isinstance(value, list):
            for one in value:
                self._each(one, path, kind, known, others)
            return
        if self.whole and isinstance(value, dict):
            self._form(value, path)
        named = value.get("class_path") if isinstance(value, dict) else value
        if not isinstance(named, str) or _is_text(named) or named.lower() in (others or ()):
            return
        found = self._class(named, path, kind, known)
        given = (value.get("init_args") if isinstance(value, dict) else None) or {}
        if found is None or not isinstance(given, dict):
            return
        ours = catalogue.classes().get(found.name) is found
        inside = catalogue.arguments(found.name) if ours else (None if found.passes_on else found.own)
        if inside is None:
            return
        for key in given:
            if key.rstrip("+") not in inside:
                raise ConfigurationError(f"{path}: {found.name} has no argument {key}{self.where}{did_you_mean(key, inside)}")
        missing = sorted(found.required - {*given})
        if missing and known is not None and (self.whole or not self.where):
            raise ConfigurationError(f"{path}: {found.name} needs {' and '.join(missing)}: set {path}.{missing[0]}{self.where}")
        for key, item in given.items():
            self.value(inside[key.rstrip("+")], item, f"{path}.{key}")

    def _form(self, value: Tree, path: str) -> None:
        """Check that a mapping names a class, and its arguments, under the two keys for that."""
        keys = ("class_path", "init_args", "dict_kwargs")
        for key in value:
            near = did_you_mean(str(key), keys)
            require(key in keys, f"There is no option {path}.{key}{self.where}{near} (a class has class_path and init_args)")
        named, given = value.get("class_path"), value.get("init_args")
        require(isinstance(named, str), f"Expected {path}.class_path to be the name of a class but got {named}{self.where}")
        kinds = (dict, type(None))
        require(isinstance(given, kinds), f"Expected {path}.init_args to be arguments by name but got {given}{self.where}")

    def _class(self, named: str, path: str, kind: str, known: dict[str, catalogue.Class] | None) -> catalogue.Class | None:
        """Return the class that is named, None if it is not one that we know, such as the user's own."""
        short = named.rpartition(".")[2]
        ours = catalogue.classes()
        if "." not in named:
            if known is None:
                others = names_in(*_OTHERS)
                if short in catalogue.family("Module") and short in names_in("torchvision.ops"):
                    raise ConfigurationError(f"{path}: torchvision has a {short} too: name ours by its path, fedlight.{short}{self.where}")
                if short in ours or short in others:
                    return ours.get(short)
                near = did_you_mean(short, [*catalogue.family("Module"), *catalogue.family("Optimizer"), *others])
                raise ConfigurationError(f"{path}: there is no class {named}{self.where}{near}")
            if short not in known:
                theirs = {one.lower(): one for one in names_in("torchvision.datasets")} if kind == "source" else {}
                if one := theirs.get(named.lower()):
                    raise ConfigurationError(
                        f"{path}: there is no source {named}{self.where}, but torchvision has it: use Torchvision with `dataset: {one}` "
                        f"(--{path} Torchvision --{path}.dataset {one})"
                    )
                shown = [name for name, found in known.items() if not found.abstract]
                lists = f" (`--{path}.help` lists them)" if path.startswith(("model.", "data.")) and path.count(".") == 1 else ""
                raise ConfigurationError(f"{path}: there is no {kind} {named}{self.where}{did_you_mean(named, shown)}{lists}")
            return known[short]
        problem = exists(named)
        require(problem is None, f"{path}: {problem}{self.where}")
        return ours.get(short) if named.startswith("fedlight.") else None

    def _plain(self, annotation: str, value: Any, path: str) -> None:
        kinds = set(re.split(r"\s*\|\s*", re.sub(r"Optional\[([\w.]+)\]", r"\1 | None", annotation))) - {"None"}
        if annotation.startswith("Literal["):
            choices = ast.literal_eval(f"({annotation[8:].partition(']')[0]},)")
            if value not in choices:
                near = did_you_mean(str(value), choices)
                raise ConfigurationError(f"Expected {path} to be one of {', '.join(map(str, choices))} but got {value}{self.where}{near}")
        if len(kinds) != 1:
            return
        (kind,) = kinds
        require(kind != "str" or not isinstance(value, (dict, list)), f"Expected {path} to be text but got {value}{self.where}")
        if kind in _NUMBERS and not _is_number(value, kind):
            words = "a whole number" if kind == "int" else "a number"
            raise ConfigurationError(f"Expected {path} to be {words} but got {value}{self.where}")
        if kind == "bool" and not (isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")):
            raise ConfigurationError(f"Expected {path} to be true or false but got {value}{self.where}")


def check_section(name: str, kind: str, tree: Tree, path: Path) -> None:
    """Refuse a section of a file, the arguments of fedlight's class ``kind``, with a mistake that shows before anything is imported."""
    inside = catalogue.arguments(kind) or {}
    _Checker(f" in {path}", whole=True).keys(inside, tree, f"{name}.")
    missing = sorted(catalogue.classes()[kind].required - {*tree})
    require(not missing, f"Expected {' and '.join(f'{name}.{one}' for one in missing)} in {path} but got none: add it")


def _is_text(value: str) -> bool:
    """Whether a value is a configuration written out, or the path of one, rather than the name of a class."""
    return not re.fullmatch(r"[A-Za-z_][\w.]*", value) or value.endswith((".yaml", ".yml", ".json")) or Path(value).is_file()


def _is_number(value: Any, kind: str) -> bool:
    if isinstance(value, (bool, dict, list)):
        return False
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return kind == "float" or number.is_integer()


def check_settings(subcommand: str, tree: Tree) -> None:
    """Refuse a comparison or an audit of nothing."""
    missing = sorted(catalogue.classes()[SETTINGS[subcommand]].required - {*tree})
    if missing:
        examples = ", ".join(name for name in shipped() if name.startswith(subcommand))
        raise ConfigurationError(
            f"Expected {' and '.join(missing)} for `{subcommand}` but got none: write them into a file, or start from a shipped "
            f"configuration, as in `fedlight {subcommand} --config {subcommand}_digits` (there are {examples})"
        )


def check_run(subcommand: str, tree: Tree) -> None:
    """Refuse settings of a run that cannot work on this machine, or that would give a figure of nothing."""
    if subcommand in ("validate", "test", "predict"):
        require(
            tree.get("ckpt_path"),
            f"Expected `ckpt_path` for `{subcommand}` but got none, and a model that nobody trained says nothing: give "
            "--ckpt_path logs/<experiment>/<run>/checkpoints/last.ckpt",
        )
    model = tree.get("model") or {}
    if isinstance(model, dict) and not model.get("network"):
        raise ConfigurationError(
            "Expected model.network but got none: name it, or start from a shipped configuration, as in "
            f"`fedlight {subcommand} --config digits`"
        )
    trainer = tree.get("trainer") or {}
    if not isinstance(trainer, dict):
        return
    rounds = trainer.get("max_steps")
    endless = rounds is None or (_is_number(rounds, "int") and float(rounds) < 0)
    require(subcommand != "fit" or not endless or any(trainer.get(name) for name in _ENDS), NO_ROUNDS)
    _check_monitors(trainer.get("callbacks"), model)
    _check_accelerator(trainer.get("accelerator"))
    loggers = trainer.get("logger")
    for one in loggers if isinstance(loggers, list) else [loggers]:
        named = one.get("class_path") if isinstance(one, dict) else one
        if isinstance(named, str):
            package = _PACKAGES.get(name := named.rpartition(".")[2])
            there = package is None or find_spec(package) is not None
            require(there, f"Expected the package {package} for trainer.logger {name} but it is not installed: pip install {package}")


def _check_accelerator(value: Any) -> None:
    if not isinstance(value, str):
        return
    if value not in _ACCELERATORS:
        raise ConfigurationError(
            f"Expected trainer.accelerator to be one of {', '.join(_ACCELERATORS)} but got {value}{did_you_mean(value, _ACCELERATORS)}"
        )
    if value not in ("gpu", "cuda", "mps"):
        return
    found = False
    if sys.platform != "linux" or any(Path("/dev").glob(pattern) for pattern in _DEVICES):  # else torch need not be asked
        import torch

        apple = torch.backends.mps.is_available()
        found = {"gpu": apple or torch.cuda.is_available(), "cuda": torch.cuda.is_available(), "mps": apple}[value]
    if not found:
        raise ConfigurationError(
            f"Expected a device for trainer.accelerator {value} but there is none here: leave it out, or use --trainer.accelerator cpu"
        )


def _check_monitors(callbacks: Any, model: Any) -> None:
    """Refuse a misspelt `monitor`, where the network is one of fedlight's, whose metrics are known."""
    network = model.get("network") if isinstance(model, dict) else None
    named = network.get("class_path") if isinstance(network, dict) else network
    if not isinstance(named, str) or not catalogue.is_a(named.rpartition(".")[2], "Module"):
        return
    own = model.get("metrics")
    known = {*metric_names(), *(f"{stage}/{name}" for name in (own if isinstance(own, dict) else {}) for stage in ("val", "test"))}
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = one.get("init_args") if isinstance(one, dict) else None
        monitor = arguments.get("monitor") if isinstance(arguments, dict) else None
        if isinstance(monitor, str) and monitor not in known and not monitor.startswith("lr-"):
            near = did_you_mean(monitor, known)
            listed = "" if near else f" (of validation there are {', '.join(sorted(name for name in known if name.startswith('val/')))})"
            raise ConfigurationError(f"trainer.callbacks: there is no metric {monitor} to monitor{near}{listed}")
