"""Arguments of the wrong class: what came is named before anything else fails because of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from numbers import Integral, Real
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

from fedlight.core.errors import ConfigurationError, require

Kinds = Mapping[str, type | UnionType]
"""The class that each argument has to be of, by name."""

_WORDS = {Integral: "a whole number", Real: "a number", Callable: "a function", Mapping: "a dict"}


def require_kinds(given: Mapping[str, object], kinds: Kinds, hints: Mapping[str, str] | None = None) -> None:
    """Raise ``ConfigurationError`` unless the arguments in ``given`` that have a kind are of it.

    ``hints`` are arguments, by name, that somebody who gave a number may have meant.
    """
    for name, kind in kinds.items():
        value = given[name]
        if isinstance(value, kind):
            continue
        wanted = " or ".join(_word(one) for one in get_args(kind) or (kind,) if one is not NoneType)
        if isinstance(value, type):
            got = f"the class {value.__name__}: call it, {value.__name__}(...)"
        elif isinstance(value, str):
            got = f"{value!r}" + (f": give fedlight.{value}(...)" if value[:1].isupper() and value.isidentifier() else "")
        elif isinstance(value, (int, float)):
            got = str(value) + (f"; did you mean {hints[name]}?" if hints and name in hints else "")
        else:
            got = "None" if value is None else f"an object of {type(value).__name__}"
        raise ConfigurationError(f"Expected `{name}` to be {wanted} but got {got}")


def kinds_of(function: Callable[..., object]) -> dict[str, Any]:
    """Return the kinds of a function's arguments, but for ``**`` ones, as its annotations say; numbers and dicts are of any class."""
    return {name: _kind(hint) for name, hint in get_type_hints(function).items() if name != "return" and get_origin(hint) is not Unpack}


def _kind(hint: Any) -> Any:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return reduce(or_, map(_kind, get_args(hint)))
    return {int: Integral, float: Real, dict: Mapping, Literal: str}.get(kind, kind)


def _word(kind: type) -> str:
    return _WORDS.get(kind) or f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}"


def derives_from(value: object, package: str) -> bool:
    """Whether an object's class has a base in a package, which need not be imported."""
    return any(base.__module__.partition(".")[0] == package for base in type(value).__mro__)


def refuse_other_lightning(name: str, value: object) -> None:
    """Raise ``ConfigurationError`` for a module of `pytorch_lightning`, a package of its own whose classes `lightning` does not know."""
    require(
        not derives_from(value, "pytorch_lightning"),
        f"Expected `{name}` to be of the package lightning but {type(value).__name__} derives from a class of pytorch_lightning, which "
        "is another one: write `import lightning.pytorch as pl` in its file and where the Trainer is made",
    )
