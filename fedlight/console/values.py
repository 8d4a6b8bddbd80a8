"""What happens to arguments before Lightning is imported: help that they ask for, checks, and parts of the run made to try their values."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlight.console import catalogue
from fedlight.console.arguments import Tree, read
from fedlight.console.catalogue import source
from fedlight.console.check import check
from fedlight.console.configs import with_files
from fedlight.console.help import asked_for
from fedlight.console.options import RUNS, annotation_of
from fedlight.core.errors import ConfigurationError, DataError, require
from fedlight.core.flags import refused_flag

log = logging.getLogger(__name__)

_PARTS = {
    "model.network": "",
    "model.codec": "Codec",
    "model.algorithm": "Algorithm",
    "model.engine": "Engine",
    "model.privacy": "PrivacyMechanism",
    "model.aggregator": "Aggregator",
    "model.downlink": "Downlink",
    "model.availability": "Availability",
    "data.source": "DataSource",
    "data.partitioner": "Partitioner",
    "data.sampler": "ClientSampler",
}
"""What is tried, each with the class that it has to be; networks are not made, which may take long."""


class _Unclear(Exception):
    """A value that only the parser can make."""


def prepare(args: Sequence[str]) -> list[str]:
    """Return checked arguments with files for names of configurations, or print the help that they ask for and end."""
    listed = asked_for(args)
    if listed is not None:
        print(listed, flush=True)
        raise SystemExit(0)
    check(args)
    try_values(args)
    return with_files(args)


def try_values(args: Sequence[str]) -> None:
    """Make the parts of the run that the arguments of `fedlight` describe, where that is quick, and refuse what they refuse.

    What is not refused may still be wrong: the parser and the run check everything.
    """
    if not args or args[0] not in RUNS:
        return
    given = read(args[1:])
    if given.asks_for_help:
        return
    tree = given.tree()
    check_ckpt_path(tree.get("ckpt_path"))
    check_threads(tree.get("threads"))
    trainer = tree.get("trainer")
    if isinstance(trainer, dict) and args[0] == "fit" and (refused := refused_flag(trainer)):
        raise ConfigurationError(refused)
    made = {path: _try(args[0], path, base, tree) for path, base in _PARTS.items()}
    _try_data(tree.get("data"), made)


def check_ckpt_path(given: Any) -> None:
    """Refuse a checkpoint that is missing or damaged; nothing of it is loaded."""
    if not given or given in ("best", "last", "hpc", "registry"):  # Lightning's keywords
        return
    require("://" not in str(given), f"Expected `ckpt_path` to be a file but got {given}: download it yourself, from whom you trust")
    require(Path(given).is_file(), f"Expected `ckpt_path` to be a checkpoint but there is no file {given}: correct the path")
    from fedlight.core.checkpoint import check_checkpoint

    check_checkpoint(Path(given))


def check_threads(threads: Any) -> None:
    """Refuse less than one thread."""
    require(not isinstance(threads, int) or threads >= 1, f"Expected `threads` >= 1 but got {threads}: leave it out to have one chosen")


def _try(subcommand: str, path: str, base: str, tree: Tree) -> Any:
    """Return the part that the settings describe at a path, None if it is not certain what it is."""
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    try:
        return _made(value, base, path, make=path != "model.network", annotation=annotation_of(subcommand, path) or "")
    except _Unclear:
        return None


def _made(value: Any, base: str, path: str, make: bool = True, annotation: str = "") -> Any:
    if isinstance(value, dict):
        named, arguments = value.get("class_path"), value.get("init_args") or {}
    else:
        named, arguments = value, {}
    if not isinstance(named, str) or not re.fullmatch(r"[A-Za-z_][\w.]*", named) or not isinstance(arguments, dict):
        raise _Unclear
    own = named.partition(".")[0] not in ("fedlight", named)
    if not (make or own):
        raise _Unclear
    kind = _class(named, path)
    if base and inspect.isclass(kind):
        root = getattr(importlib.import_module("fedlight"), base)
        require(issubclass(kind, root), f"{path}: {named} is no {base}: name another class, or derive yours from fedlight.{base}")
    short = named.rpartition(".")[2]
    if not make or kind is None or not kind.__module__.startswith("fedlight."):
        raise _Unclear  # what a user's own class does when it is made, it does once
    kinds = catalogue.arguments(short) or {}
    given = {str(name): _value(item, kinds.get(str(name), ""), f"{path}.{name}") for name, item in arguments.items()}
    try:
        return kind(**given)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except Exception as error:  # the parser will say what it is
        log.debug("%s: %s", path, error)
        raise _Unclear from error


def _value(value: Any, annotation: str, path: str) -> Any:
    if isinstance(value, list):
        return [_value(item, annotation, path) for item in value]
    bases = [one for one in re.findall(r"\b[A-Z]\w+", annotation) if catalogue.family(one)]
    if isinstance(value, dict) or (isinstance(value, str) and bases):
        return _made(value, "", path)
    if isinstance(value, str) and re.search(r"\b(float|int)\b", annotation) and "str" not in annotation:
        try:
            return float(value)
        except ValueError as error:
            raise _Unclear from error
    return value


def _class(named: str, path: str) -> Any:
    """Return a class of fedlight's, of torch's or of the user's own; None of any other, whose import may take long."""
    module, _, name = named.rpartition(".")
    top = module.partition(".")[0]
    if top in ("", "fedlight"):
        package = importlib.import_module("fedlight")
        return getattr(package, name) if name in package.__all__ and name in catalogue.classes() else None
    file = source(module)
    if file is None or (top != "torch" and "site-packages" in file.parts):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ConfigurationError(f"{path}: {named} cannot be imported: {type(error).__name__}: {error}") from error


def _try_data(tree: Any, made: dict[str, Any]) -> None:
    """Refuse data whose files are missing, and cohorts larger than their population."""
    if not isinstance(tree, dict):
        return
    from fedlight.data.federated import data_root
    from fedlight.data.natural import Explicit, Natural

    origin, sampler, partitioner = (made[f"data.{name}"] for name in ("source", "sampler", "partitioner"))
    if origin is not None:
        try:
            origin.require_files(data_root(tree.get("root")))
        except (ConfigurationError, DataError) as error:
            raise type(error)(f"data.source: {error}") from error
    clients = tree.get("num_clients", 20)
    if sampler is not None and partitioner is not None and not isinstance(partitioner, (Natural, Explicit)) and isinstance(clients, int):
        try:
            sampler.validate(clients)
        except ConfigurationError as error:
            raise ConfigurationError(f"data.sampler: {error}") from error
