"""The objects that a network holds on to: all that Python lets it keep state in, and that a copy of it must not share."""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedlight.core.fingerprint import slots

ATOMS = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, torch.Size)
"""What cannot change."""

EXACT_ATOMS = frozenset(ATOMS)
CONTAINERS = frozenset((dict, list, tuple, set, frozenset, deque, Counter, OrderedDict))
"""Containers of Python's own, which hold their items and nothing else."""

FOREIGN = frozenset(
    "lightning pytorch_lightning fedlight torch numpy logging builtins io _io random jsonargparse argparse".split()  # noqa: SIM905
)
"""Packages whose objects (but for modules, containers and generators of random numbers) are left alone."""

Step = tuple[Any, Any, Any]
"""The step of an object's holder (None: there is none), its name there (``Named``, or the key of an item), and the object."""


class Named(str):
    """A name that is written as it is, such as ``.layers``; keys of items are written in brackets."""

    __slots__ = ()


def is_flat(held: object) -> bool:
    """Whether an object is a container of nothing but what cannot change, or tuples of it: one look, however large it is."""
    if type(held) not in CONTAINERS:
        return False
    parts: Any = chain(held, held.values()) if isinstance(held, dict) else held
    if EXACT_ATOMS.issuperset(map(type, parts)):  # most are: nothing is made to find it out
        return True
    parts = [*held, *held.values()] if isinstance(held, dict) else held
    kinds = set(map(type, parts)) - EXACT_ATOMS
    return kinds == {tuple} and EXACT_ATOMS.issuperset(map(type, chain.from_iterable([part for part in parts if type(part) is tuple])))


def is_data(held: object) -> bool:
    """Whether an object only provides data: a data set, a loader, a data module."""
    return isinstance(held, (Dataset, DataLoader)) or (hasattr(held, "prepare_data") and not isinstance(held, nn.Module))


def attributes(held: object) -> dict[str, Any] | None:
    """Return an object's own attributes, which are changed in place; None for one that has none, or belongs to a library."""
    if isinstance(held, nn.Module):
        return vars(held)
    package = type(held).__module__.partition(".")[0]
    if isinstance(held, (type, types.ModuleType, logging.Logger)) or package in FOREIGN or is_data(held):
        return None
    found = getattr(held, "__dict__", None)
    return found if isinstance(found, dict) else {} if slots(held) else None


def is_global(function: types.FunctionType) -> bool:
    """Whether a function is found under its own name in its module, where everybody shares it."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def children(held: object) -> Iterable[tuple[Any, Any]]:
    """Return the names and objects of what an object holds, but for what cannot change."""
    return () if is_flat(held) else _children(held)


def _children(held: object) -> Iterator[tuple[Any, Any]]:
    if isinstance(held, (dict, list, tuple)) and type(held) in CONTAINERS:  # by far the most, where there are many
        named = held.items() if isinstance(held, dict) else enumerate(held)
        yield from [(name, part) for name, part in named if type(part) not in EXACT_ATOMS]
        return
    if isinstance(held, Tensor):
        if isinstance(held, nn.Parameter):
            yield from ((Named(" through its hook"), hook) for table in hooks(held) for hook in table.values())
        return
    if isinstance(held, (*ATOMS, np.ndarray, type, types.ModuleType)) or is_data(held):
        return
    if isinstance(held, dict):
        yield from ((key, value) for key, value in list(held.items()) if not isinstance(value, ATOMS))
    elif isinstance(held, (list, tuple, deque)):
        yield from ((number, value) for number, value in enumerate(list(held)) if type(value) not in EXACT_ATOMS)
    elif isinstance(held, (set, frozenset)):
        yield from ((Named("{}"), value) for value in list(held) if not isinstance(value, ATOMS))
    elif isinstance(held, functools.partial):
        yield from ((Named(".func"), held.func), (Named(".args"), held.args), (Named(".keywords"), held.keywords))
    elif isinstance(held, types.MethodType):
        yield from ((Named(".__self__"), held.__self__), (Named(".__func__"), held.__func__))
    elif isinstance(held, types.FunctionType):
        if not is_global(held):
            cells = zip(held.__code__.co_freevars, held.__closure__ or (), strict=True)
            yield from ((Named(f" through its variable `{name}`"), contents(cell)) for name, cell in cells)
            yield from ((Named(" through its defaults"), part) for part in (held.__defaults__, held.__kwdefaults__, held.__dict__) if part)
        return
    own = attributes(held)
    if own is not None:
        own = _copied_state(held, own)
        yield from ((Named(f".{name}"), value) for name, value in list(own.items()) if name not in ("_trainer", "_fabric"))
        yield from ((Named(f".{name}"), getattr(held, name)) for name in slots(held))


def _copied_state(held: object, own: dict[str, Any]) -> dict[str, Any]:
    """Return what of an object's attributes goes into copies: some classes leave out what they make again, such as compiled code."""
    if type(held).__getstate__ is object.__getstate__ or hasattr(type(held), "__deepcopy__"):
        return own
    made = held.__getstate__()
    return made if isinstance(made, dict) else own


def hooks(tensor: Tensor) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return the hooks of a tensor: those of its gradient, and those that are called when it has been added up."""
    return tensor._backward_hooks or {}, getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def contents(cell: types.CellType) -> Any:
    """Return what a variable of an enclosing function holds, None if nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def walk(root: object, name: str) -> Iterator[Step]:
    """Yield every object that can be reached from ``root``, itself included, each once; their names are written when they are needed."""
    seen: set[int] = set()
    waiting: deque[Step] = deque([(None, Named(name), root)])
    while waiting:
        step = waiting.popleft()
        held = step[2]
        if id(held) in seen or (type(held) not in CONTAINERS and isinstance(held, ATOMS)):
            continue
        seen.add(id(held))
        yield step
        for name, child in children(held):
            waiting.append((step, name, child))


def readable(step: Step | None) -> str:
    """Return an object's path as users write it: ``._modules['net']`` is ``.net``."""
    path = ""
    while step is not None:
        step, name, _ = step
        path = (name if isinstance(name, Named) else f"[{name!r}]") + path
    for table in ("_modules", "_parameters", "_buffers"):
        while f".{table}['" in path:
            before, _, after = path.partition(f".{table}['")
            key, _, rest = after.partition("']")
            path = f"{before}.{key}{rest}"
    return path


LARGE = 1 << 20
"""Bytes beyond which a tensor or an array that is no buffer is taken for data: shared and not to be changed."""


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor is taken for data."""
    return tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > LARGE
