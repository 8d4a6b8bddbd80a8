"""Imports go one way: no circle among packages, and none of more than two files within one."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import fedlight
from tests.federation import heavy_imports

ROOT = Path(fedlight.__file__).parent


def files() -> dict[str, Path]:
    """Return the package's files by module name."""
    return {
        ".".join(("fedlight", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")
    }


def imports() -> dict[str, set[str]]:
    """Return which of the package's modules each one imports, at any level and also for type checking alone."""
    known = files()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedlight"):
                found[name] |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in known}
        found[name].discard(name)
    return found


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Return the sets of nodes that reach each other, of two nodes or more."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    ahead = {node: reached(node) for node in graph}
    sets = {frozenset({other for other in ahead[node] if node in ahead.get(other, ())} | {node}) for node in graph}
    return [set(found) for found in sets if len(found) > 1]


def package(module: str) -> str:
    """Return the package of a module: the second part of its name; files at the top are packages of their own."""
    return module.split(".")[1] if "." in module else module


def test_circles_are_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [{"a", "b", "c"}]


def test_packages_form_no_circle() -> None:
    between: dict[str, set[str]] = {}
    for module, others in imports().items():
        if module != "fedlight":  # whose names are looked up when they are used
            between.setdefault(package(module), set()).update(package(other) for other in others if package(other) != package(module))
    assert not circles(between)


def test_no_circle_has_more_than_two_files() -> None:
    """Of a package and its own files none: what its ``__init__`` offers is made of them."""
    packages = {name for name, path in files().items() if path.name == "__init__.py"}
    graph = {name: {other for other in others if other not in packages} for name, others in imports().items() if name not in packages}
    assert [found for found in circles(graph) if len(found) > 2] == []


def test_the_module_is_known_to_modules_alone() -> None:
    allowed = ("fedlight.modules", "fedlight.callbacks", "fedlight.cli", "fedlight.federated_cli", "fedlight.usage")
    users = {name for name, others in imports().items() if "fedlight.modules.federated" in others}
    assert all(name == "fedlight" or name.startswith(allowed) for name in users)


@pytest.mark.slow
def test_a_round_needs_no_lightning() -> None:
    """A server that draws a cohort loads neither Lightning nor what comes with it."""
    drawn = "assert len(sampling.Uniform(3).sample(10, 0, 0, 0)) == 3"
    assert heavy_imports(f"import fedlight.rounds, fedlight.data.sampling as sampling\n{drawn}") == set()
