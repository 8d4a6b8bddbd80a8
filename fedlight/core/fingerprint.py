"""Settings as text that compares values: equal settings make equal text in every process, and nothing goes by where it lies in memory."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.core.digest import digest_tensors

LONGEST = 2000
"""Characters of a text beyond which a digest stands for it."""

_MOVING = (np.random.Generator, np.random.RandomState, torch.Generator, random.Random, io.IOBase, types.GeneratorType)
# What changes while it is used, so that its class alone is a setting.

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(value: Any) -> str:
    """Return a value as text, by what it holds: functions by name and code, objects by class and state, arrays by a digest.

    An object within itself, as in a tree whose nodes know their parent, is named by its place. Long text is shortened to a digest.

    >>> describe({"lr": 0.1, "betas": (0.9, 0.99)}) == describe({"betas": (0.9, 0.99), "lr": 0.1})
    True
    >>> describe({"lr": 0.1}) == describe({"lr": 0.2})
    False
    """
    return shortened(_Walk().text(value))


def shortened(text: str) -> str:
    """Return the text, or its beginning and a digest where it is long."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:100]}... ({len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()})"


def describe_network(network: nn.Module) -> str:
    """Return a network as text: its layers as they show themselves, without addresses, and the functions that they hold."""
    walk = _Walk()
    functions = [
        f"{name}.{attribute}={walk.text(held)}"
        for name, part in network.named_modules()
        for attribute, held in vars(part).items()
        if isinstance(held, (types.FunctionType, functools.partial))
    ]
    return shortened(_ADDRESS.sub("", repr(network)) + "".join(functions))


def name_of(function: Callable[..., Any]) -> str:
    """Return the full name of a function or class; a callable object goes by its class."""
    # The command line's callable objects hold the whole command line.
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


class _Walk:
    """One pass over a value, which remembers what it has met so that it ends."""

    def __init__(self) -> None:
        self.met: dict[int, int] = {}
        self.kept: list[Any] = []  # what was met stays alive, or another object could take its address

    def text(self, value: Any) -> str:
        """Return one value as text."""
        if value is None or type(value) in (bool, int, float, str, bytes, complex):
            return repr(value)
        if type(value) in (dict, list, tuple) and (plain := _plain(value)) is not None:
            return plain
        if inspectable(value):
            return self._function(value)
        if isinstance(value, _MOVING):
            return type(value).__name__
        if id(value) in self.met:
            return f"<{self.met[id(value)]}>"
        self.met[id(value)] = len(self.met)
        self.kept.append(value)
        return self._object(value)

    def _function(self, value: Any) -> str:
        if isinstance(value, functools.partial):
            given = [*map(self.text, value.args), *(f"{name}={self.text(entry)}" for name, entry in value.keywords.items())]
            return f"partial({', '.join([self.text(value.func) if inspectable(value.func) else name_of(value.func), *given])})"
        name = name_of(value)
        if isinstance(value, types.FunctionType) and ("<lambda>" in name or "<locals>" in name):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            code = value.__code__
            constants = [one.co_code.hex() if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
            made_of = (code.co_code.hex(), code.co_names, constants, value.__defaults__, cells)
            return f"{name}#{hashlib.sha256(self.text(list(made_of)).encode()).hexdigest()[:16]}"
        return name

    def _object(self, value: Any) -> str:
        kind = type(value).__name__
        if isinstance(value, (Tensor, np.ndarray)):
            if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
                return f"array({self.text(value.tolist())})"
            if isinstance(value, np.ndarray):
                digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
            else:
                digest = digest_tensors({"": value})
            return f"{kind}({value.dtype}, {list(value.shape)}, {digest.hex()})"
        if type(value).__module__.startswith("jsonargparse"):  # what makes a part of a YAML holds the whole command line
            return name_of(value)
        if isinstance(value, nn.Module):
            return _ADDRESS.sub("", repr(value))
        if isinstance(value, Mapping):
            entries = sorted((self.text(key), self.text(entry)) for key, entry in value.items())
            return f"{kind}{{{', '.join(f'{key}: {entry}' for key, entry in entries)}}}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.text, value))}]"
        if isinstance(value, (set, frozenset)):
            return f"{kind}{{{', '.join(sorted(map(self.text, value)))}}}"
        return f"{kind}({self._state(value)})"

    def _state(self, value: Any) -> str:
        """Return what an object is made of: its attributes, else what pickling would keep of it, else nothing."""
        held = {name: getattr(value, name) for name in slots(value)} | getattr(value, "__dict__", {})
        if held:
            return ", ".join(f"{name}={self.text(entry)}" for name, entry in held.items())
        try:
            made_of = value.__reduce_ex__(4)
        except Exception:  # what cannot be pickled, such as a lock, goes by its class
            return ""
        return made_of if isinstance(made_of, str) else ", ".join(map(self.text, made_of[1:3]))


def inspectable(function: object) -> bool:
    """Whether a callable goes by its own name, or by its code; a callable object goes by its class."""
    return isinstance(function, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, functools.partial))


def _plain(value: Any) -> str | None:
    """Return a container of plain values as text, in one call however large it is; None if it holds anything else, or itself."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def slots(held: object) -> list[str]:
    """Return the names of the slots of an object that hold something."""
    found: list[str] = []
    for kind in type(held).__mro__:
        names = vars(kind).get("__slots__", ())
        found += [name for name in ((names,) if isinstance(names, str) else names) if name not in ("__dict__", "__weakref__")]
    return [name for name in found if hasattr(held, name)]
