"""The classes that a configuration may name, ours and others', and their arguments, read from source files without importing them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fedlight.console.names import did_you_mean

Arguments = dict[str, str]
"""Names of arguments, each with its annotation as it is written ("" without one)."""

_FAMILIES = (
    *("deploy", "flower", "aggregation", "audit", "callbacks", "clients", "codecs", "compare", "core", "data", "modules", "privacy"),
    *("rounds", "servers"),
)
"""Folders of classes; of two with one name the later is meant."""


@dataclass(frozen=True)
class Class:
    """A class as its source tells it."""

    name: str
    bases: tuple[str, ...] = ()  # names, without their modules
    text: str = ""  # its docstring, or else its constructor's
    own: Arguments | None = None  # arguments of its constructor, or the fields of a dataclass; None if it inherits them
    passes_on: bool = False  # whether the arguments of its bases are its own as well
    abstract: bool = False  # whether it is no use by itself
    defaults: Arguments = field(default_factory=dict)  # source of the default of each argument that has one
    sets: frozenset[str | None] = frozenset()  # arguments of its bases that its constructor gives them itself

    @property
    def sentence(self) -> str:
        """First paragraph of the docstring."""
        return self.text.partition("\n\n")[0].replace("\n", " ")

    @property
    def required(self) -> set[str]:
        """Names of the arguments that must be given."""
        return {*(self.own or ())} - {*self.defaults}


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
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    made = methods.get("__init__")
    text = ast.get_docstring(node) or (made and ast.get_docstring(made)) or ""
    abstract = "ABC" in bases or any("abstractmethod" in ast.unparse(one) for part in methods.values() for one in part.decorator_list)
    abstract = abstract or node.name.startswith("_")
    if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        fields = {part.target.id: part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
        own = {name: ast.unparse(part.annotation) for name, part in fields.items()}
        defaults = {name: ast.unparse(part.value) for name, part in fields.items() if part.value is not None}
        return Class(node.name, bases, text, own, True, abstract, defaults)
    if made is None:
        return Class(node.name, bases, text, None, False, abstract)
    given = made.args
    placed = [*given.posonlyargs, *given.args][1:]
    own = {one.arg: ast.unparse(one.annotation) if one.annotation else "" for one in [*placed, *given.kwonlyargs]}
    values = [*zip(reversed(placed), reversed(given.defaults), strict=False), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    defaults = {one.arg: ast.unparse(value) for one, value in values if value is not None}
    calls = [one for one in ast.walk(made) if isinstance(one, ast.Call) and ast.unparse(one.func) == "super().__init__"]
    sets = frozenset(word.arg for call in calls for word in call.keywords)
    return Class(node.name, bases, text, own, given.kwarg is not None, abstract, defaults, sets)


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
        own = {**{one: inherited[one] for one in inherited if one not in found.sets}, **own}
    return own


def family(base: str) -> dict[str, Class]:
    """Return the classes to choose from where a ``base`` is wanted, by name: those in `fedlight.__all__` that build on it."""
    import fedlight

    public = {*fedlight.__all__}
    return {name: found for name, found in sorted(classes().items()) if name in public and not found.abstract and is_a(name, base)}


def is_a(name: str, base: str, known: dict[str, Class] | None = None, below: tuple[str, ...] = ()) -> bool:
    """Whether a class is ``base`` or builds on it, of the ``known`` ones (fedlight's); ``below`` are those that the question came from."""
    known = classes() if known is None else known
    above = known[name].bases if name in known else ()
    return name == base or any(is_a(one, base, known, (*below, name)) for one in above if one not in below)


def lineage(found: Class, below: tuple[str, ...] = ()) -> list[Class]:
    """Return a class and those of fedlight's that it builds on, the most basic first."""
    known = [classes()[base] for base in found.bases if base in classes() and base not in below]
    return [*(one for base in reversed(known) for one in lineage(base, (*below, found.name))), found]


@cache
def trainer() -> Class:
    """Return Lightning's Trainer as its source tells it, without arguments if that is not found."""
    path = source("lightning.pytorch.trainer.trainer")
    return next((one for one in (read_classes(path) if path else ()) if one.name == "Trainer"), Class("Trainer"))


def source(module: str) -> Path | None:
    """Return the source file of a module, or None if it has none that can be read (or does not exist)."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for place in map(Path, spec.submodule_search_locations or ()):
        base = place.joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def exists(dotted: str) -> str | None:
    """Return what is wrong with the path of a class, such as `torch.optim.SDG`, or None if nothing is seen to be."""
    module, _, name = dotted.rpartition(".")
    top = module.partition(".")[0]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return f"there is no module {top} for {dotted}; one of your own belongs in the current folder or on PYTHONPATH"
    path = source(module)
    if path is None:
        return None  # compiled, a class within a class, or made at run time
    text = path.read_text(encoding="utf-8", errors="replace")
    if re.search(rf"\b{re.escape(name)}\b", text) or re.search(r"import \*|def __getattr__", text):
        return None
    names = set(re.findall(r"\b[A-Z]\w+", text))
    return f"there is no {name} in {module}{did_you_mean(name, names)}"


def names_in(*modules: str) -> list[str]:
    """Return the capitalised names in these packages' own source files."""
    found: set[str] = set()
    for module in modules:
        path = source(module)
        for file in sorted(path.parent.rglob("*.py")) if path else ():
            found.update(re.findall(r"^class (\w+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))
    return sorted(found)


@cache
def lightning_classes(kind: str) -> dict[str, Class]:
    """Return Lightning's classes of a kind, `callbacks` or `logger`, by name; none if its source is not found."""
    package = source(f"lightning.pytorch.{'loggers' if kind == 'logger' else kind}")
    found = {one.name: one for path in (sorted(package.parent.rglob("*.py")) if package else ()) for one in read_classes(path)}
    return {name: one for name, one in found.items() if is_a(name, kind.removesuffix("s").capitalize(), found)}
