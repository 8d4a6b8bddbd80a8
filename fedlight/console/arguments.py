"""Command-line arguments as the tree of settings that they and their files describe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedlight.console.configs import find
from fedlight.core.errors import ConfigurationError, require

Tree = dict[str, Any]

_HELP = ("help", "h", "print_config", "print_shtab", "print_completion")


@dataclass
class Given:
    """What was given to a subcommand."""

    files: list[tuple[Path, Tree]] = field(default_factory=list)  # configurations, each a path and its settings, in order
    settings: list[tuple[str, Any]] = field(default_factory=list)  # (dotted name, value) of the options, in order
    missing: list[str] = field(default_factory=list)  # names of options without a value
    loose: list[str] = field(default_factory=list)  # what belongs to no option
    asks_for_help: bool = False  # whether there is an option that prints something and ends

    def tree(self) -> Tree:
        """Return all settings in one tree, later ones before earlier ones."""
        whole: Tree = {}
        for _, tree in self.files:
            whole = merge(whole, copy.deepcopy(tree))
        for name, value in self.settings:
            put(whole, name.split("."), value)
        return whole


def read(args: Sequence[str]) -> Given:
    """Return what these arguments, those after the subcommand, say; raises ``ConfigurationError`` for a file that cannot be read."""
    given = Given()
    waiting = list(args)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-") or word == "-":
            given.loose.append(word)
            continue
        name, equals, value = word.partition("=")
        plain = name.lstrip("-")
        if plain in _HELP or plain.endswith(".help"):
            given.asks_for_help = True
            return given
        if not equals:
            if not waiting or _is_option(waiting[0]):
                given.missing.append(plain)
                continue
            value = waiting.pop(0)
        if plain in ("config", "c"):
            given.files += _file(value)
        else:
            given.settings.append((plain, _parsed(value)))
    return given


def _is_option(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _file(value: str) -> list[tuple[Path, Tree]]:
    if not value:
        return []
    if value.lstrip().startswith("{") or "\n" in value:
        tree = _parsed(value)
        return [(Path("the configuration given"), tree)] if isinstance(tree, dict) else []
    path = find(value)
    return [(path, read_yaml(path))]


def read_yaml(path: Path) -> Tree:
    """Return the settings in a file; raises ``ConfigurationError`` if it cannot be read, is no YAML, or holds no mapping."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"Expected a YAML file but {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"Expected YAML but {path} is none: {_place(error)}") from error
    require(isinstance(tree, dict), f"Expected a mapping of options in {path} but got {type(tree).__name__}")
    return tree  # type: ignore[no-any-return]


def _place(error: yaml.YAMLError) -> str:
    """Return where the parser stopped and why.

    >>> _place(yaml.MarkedYAMLError(problem="found a tab", problem_mark=yaml.Mark("", 0, 2, 0, None, None)))
    'line 3, column 1: found a tab'
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else " ".join(str(error).split())


def merge(base: Any, changes: Any) -> Any:
    """Return ``base`` updated with ``changes``, mapping by mapping; a mapping that names another class replaces the old one.

    >>> merge({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2]})
    {'a': {'x': 1, 'y': 3}, 'b': [2]}
    >>> merge({"class_path": "Old", "init_args": {"x": 1}}, {"class_path": "New"})
    {'class_path': 'New'}
    """
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    new = changes.get("class_path")
    if new is not None and str(new).rpartition(".")[2] != str(base.get("class_path")).rpartition(".")[2]:
        return dict(changes)
    return {**base, **{key: merge(base.get(key), value) for key, value in changes.items()}}


def put(tree: Tree, path: Sequence[str], value: Any) -> None:
    """Set a value in a tree, in place, as the command line does: an argument of a class goes to its `init_args`.

    >>> tree = {"codec": "Linear"}
    >>> put(tree, ["codec", "ratio"], 4); tree
    {'codec': {'class_path': 'Linear', 'init_args': {'ratio': 4}}}
    """
    head, *rest = path
    name = head.rstrip("+")
    old = tree.get(name)
    if not rest:
        held = old.get("class_path") if isinstance(old, dict) and isinstance(value, str) else None
        if head.endswith("+"):
            tree[name] = [*(old if isinstance(old, list) else []), value]
        elif not held or held != value:
            tree[name] = value
        return
    if isinstance(old, list):
        old = old[-1] if old else None
        if not isinstance(old, dict):
            old = {"class_path": old, "init_args": {}}
        tree[name] = [*(tree[name][:-1]), old]
    elif isinstance(old, str):
        old = tree[name] = {"class_path": old, "init_args": {}}
    elif not isinstance(old, dict):
        old = tree[name] = {}
    if "class_path" in old and rest[0] not in ("class_path", "init_args", "dict_kwargs"):
        if not isinstance(old.get("init_args"), dict):
            old["init_args"] = {}
        old = old["init_args"]
    put(old, rest, value)
