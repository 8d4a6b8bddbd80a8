"""Classes of other packages, looked up in their source files without importing them."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fedlight.console.catalogue import Class, is_a, read_classes
from fedlight.console.names import did_you_mean


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
    spec = find_spec("lightning")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "pytorch" / {"logger": "loggers"}.get(kind, kind)
    found = {one.name: one for path in sorted(folder.rglob("*.py")) for one in read_classes(path)}
    return {name: one for name, one in found.items() if is_a(name, kind.removesuffix("s").capitalize(), found)}
