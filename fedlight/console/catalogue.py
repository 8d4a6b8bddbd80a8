"""The classes that a configuration may name, and their arguments, read from source files without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

Arguments = dict[str, str]
"""Names of arguments, each with its annotation as it is written ("" without one)."""

_FAMILIES = (
    *("deploy", "flower", "aggregation", "audit", "callbacks", "clients", "codecs", "compare", "core", "data", "modules", "privacy"),
    *("rounds", "servers"),
)
"""Folders of classes; of two with one name the later is meant."""


@dataclass(frozen=True)
class Class:
    """A class as its source tells it.

    Attributes:
        bases: names of its bases, without their modules.
        sentence: first sentence of its docstring.
        own: arguments of its constructor, or the fields of a dataclass; None if it inherits them.
        passes_on: whether the arguments of its bases are its own as well.
        abstract: whether it is no use by itself.
    """

    name: str
    bases: tuple[str, ...] = ()
    sentence: str = ""
    own: Arguments | None = None
    passes_on: bool = False
    abstract: bool = False
    required: frozenset[str] = field(default_factory=frozenset)


@cache
def classes() -> dict[str, Class]:
    """Return fedlight's classes by name."""
    root = Path(__file__).parents[1]
    files = [path for family in _FAMILIES for path in sorted((root / family).rglob("*.py"))]
    return {found.name: found for path in files for found in read_classes(path)}


def read_classes(path: Path) -> Iterator[Class]:
    """Yield the classes that a file defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield _class(node)


def _class(node: ast.ClassDef) -> Class:
    bases = tuple(ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases)
    bases = tuple(base for base in bases if base != node.name)  # a namesake in another package
    sentence = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    abstract = "ABC" in bases or any("abstractmethod" in ast.unparse(one) for part in methods.values() for one in part.decorator_list)
    abstract = abstract or node.name.startswith("_")
    if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
        own = {part.target.id: ast.unparse(part.annotation) for part in fields if isinstance(part.target, ast.Name)}
        needed = {part.target.id for part in fields if part.value is None and isinstance(part.target, ast.Name)}
        return Class(node.name, bases, sentence, own, True, abstract, frozenset(needed))
    if "__init__" not in methods:
        return Class(node.name, bases, sentence, None, False, abstract)
    given = methods["__init__"].args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    own = {one.arg: ast.unparse(one.annotation) if one.annotation else "" for one in named if one.arg != "self"}
    without = [one.arg for one in [*given.posonlyargs, *given.args][1:]]
    needed = set(without[: len(without) - len(given.defaults)])
    needed |= {one.arg for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None}
    return Class(node.name, bases, sentence, own, given.kwarg is not None, abstract, frozenset(needed))


def arguments(name: str, below: tuple[str, ...] = ()) -> Arguments | None:
    """Return the arguments of a class of fedlight's, those it hands on to its bases included; None if a base elsewhere may take more."""
    found = classes().get(name)
    if found is None:
        return {} if name in ("object", "ABC", "Protocol", "Generic") else None
    if found.own is not None and not found.passes_on:
        return found.own
    if found.own is None and found.bases and (first := classes().get(found.bases[0])) is not None and first.own is not None:
        return arguments(first.name, (*below, name))  # Python calls the constructor of the first base that has one
    own = dict(found.own or {})
    for base in found.bases:
        inherited = arguments(base, (*below, name)) if base not in below else None
        if inherited is None:
            return None
        own = {**inherited, **own}
    return own


def family(base: str) -> dict[str, Class]:
    """Return the classes to choose from where a ``base`` is wanted, by name: those in `fedlight.__all__` that build on it."""
    return {name: found for name, found in sorted(classes().items()) if name in _public() and not found.abstract and is_a(name, base)}


def is_a(name: str, base: str, below: tuple[str, ...] = ()) -> bool:
    """Whether a class is ``base`` or builds on it; ``below`` are the classes that the question came from."""
    return name == base or (name in classes() and any(is_a(one, base, (*below, name)) for one in classes()[name].bases if one not in below))


def trainer_arguments() -> Arguments | None:
    """Return the arguments of Lightning's Trainer, or None if its source is not found."""
    spec = find_spec("lightning")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py"
    return next((one.own for one in read_classes(path) if one.name == "Trainer"), None) if path.is_file() else None


@cache
def _public() -> frozenset[str]:
    import fedlight

    return frozenset(fedlight.__all__)
