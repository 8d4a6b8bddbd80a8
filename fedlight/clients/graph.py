"""The objects that a network holds on to: all that Python lets it keep state in, and that a copy of it must not share."""

from __future__ import annotations

import functools
import io
import logging
import operator
import random
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedlight.core.errors import ConfigurationError
from fedlight.core.fingerprint import slots

ATOMS = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, torch.Size)
"""What cannot change."""

_ATOMS = frozenset(ATOMS)
_CONTAINERS = frozenset((dict, list, tuple, set, frozenset, deque, Counter, OrderedDict))

FOREIGN = frozenset(
    "lightning pytorch_lightning fedlight torch numpy logging builtins io _io random jsonargparse argparse".split()  # noqa: SIM905
)
"""Packages whose objects (but for modules, containers and generators of random numbers) are left alone."""

Step = tuple[str, Any]
"""How an object is named where it is held, such as ``.layers`` or ``[0]``, and the object."""


def is_flat(held: object) -> bool:
    """Whether an object is a container of nothing but what cannot change, or tuples of it: one look, however large it is."""
    if type(held) not in _CONTAINERS:
        return False
    parts: Any = [*held, *held.values()] if isinstance(held, dict) else held
    kinds = set(map(type, parts)) - _ATOMS
    if kinds == {tuple}:
        kinds = set(map(type, chain.from_iterable([part for part in parts if type(part) is tuple]))) - _ATOMS
    return not kinds


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


def children(held: object) -> Iterator[Step]:
    """Yield what an object holds, but for what cannot change."""
    if is_flat(held):
        return
    if isinstance(held, Tensor):
        if isinstance(held, nn.Parameter):
            yield from ((" through its hook", hook) for table in hooks(held) for hook in table.values())
        return
    if isinstance(held, (*ATOMS, np.ndarray, type, types.ModuleType)) or is_data(held):
        return
    if isinstance(held, dict):
        yield from ((f"[{key!r}]", value) for key, value in list(held.items()) if not isinstance(value, ATOMS))
    elif isinstance(held, (list, tuple, deque)):
        yield from ((f"[{number}]", value) for number, value in enumerate(list(held)) if not isinstance(value, ATOMS))
    elif isinstance(held, (set, frozenset)):
        yield from (("{}", value) for value in list(held) if not isinstance(value, ATOMS))
    elif isinstance(held, functools.partial):
        yield from ((".func", held.func), (".args", held.args), (".keywords", held.keywords))
    elif isinstance(held, types.MethodType):
        yield from ((".__self__", held.__self__), (".__func__", held.__func__))
    elif isinstance(held, types.FunctionType):
        if not is_global(held):
            cells = zip(held.__code__.co_freevars, held.__closure__ or (), strict=True)
            yield from ((f" through its variable `{name}`", contents(cell)) for name, cell in cells)
            yield from ((" through its defaults", part) for part in (held.__defaults__, held.__kwdefaults__, held.__dict__) if part)
        return
    own = attributes(held)
    if own is not None:
        own = _copied_state(held, own)
        yield from ((f".{name}", value) for name, value in list(own.items()) if name not in ("_trainer", "_fabric"))
        yield from ((f".{name}", getattr(held, name)) for name in slots(held))


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
    """Yield every object that can be reached from ``root``, itself included, with its path, each once."""
    seen: set[int] = set()
    waiting: deque[Step] = deque([(name, root)])
    while waiting:
        path, held = waiting.popleft()
        if isinstance(held, ATOMS) or id(held) in seen:
            continue
        seen.add(id(held))
        yield path, held
        waiting.extend((path + step, child) for step, child in children(held))


def readable(path: str) -> str:
    """Return a path as users write it: ``._modules['net']`` is ``.net``."""
    for table in ("_modules", "_parameters", "_buffers"):
        while f".{table}['" in path:
            before, _, after = path.partition(f".{table}['")
            key, _, rest = after.partition("']")
            path = f"{before}.{key}{rest}"
    return path


Restore = Callable[[], None]


class Memento:
    """What a network and all that it holds are like now, to be put back in place later: the same objects, with what they held.

    Weights and buffers are left to others, as are data sets, classes and variables of modules (``import``), which everything shares.
    """

    def __init__(self, network: nn.Module) -> None:
        # What was noted must live on, or another object might take its address.
        found = list(walk(network, type(network).__name__))
        self._noted = [held for _, held in found]
        tables = {id(table) for layer in network.modules() for table in (layer._parameters, layer._buffers)}
        values = {id(t) for t in (*network.parameters(), *network.buffers())}
        noted = [one for one in self._noted if id(one) not in tables and id(one) not in values]
        self._restores = [restore for held in noted for restore in _restores(held)]
        self._restores += [functools.partial(_put_hooks, p, *map(dict, hooks(p))) for p in network.parameters()]
        self._seeds = [seed for held in noted if (seed := _seeding(held)) is not None]
        large = ((path, held) for path, held in found if isinstance(held, Tensor) and id(held) not in values and is_large(held))
        self._large = [(readable(path), held, held._version) for path, held in large]

    def put_back(self) -> None:
        """Put everything back as it was; raises ``ConfigurationError`` if a large tensor that is no buffer was changed."""
        for path, held, version in self._large:
            if held._version != version:
                raise ConfigurationError(
                    f"Expected training to leave {path} as it is, which is no buffer and of {held.nbytes:,} bytes, so that all clients "
                    "share it, but it was changed: register it as a buffer (with persistent=False, if it is the client's alone)"
                )
        for restore in self._restores:
            restore()

    def seed(self, seed: int) -> None:
        """Seed the generators that the network holds."""
        for one in self._seeds:
            one(seed)


def _restores(held: Any) -> Iterator[Restore]:
    """Yield what puts an object back into its present state."""
    if isinstance(held, dict):
        yield functools.partial(_put_items, held, dict(held))
    elif isinstance(held, (list, deque)):
        yield functools.partial(_put_parts, held, list(held))
    elif isinstance(held, set):
        yield functools.partial(_put_parts, held, set(held))
    elif isinstance(held, Tensor):
        if held.layout == torch.strided and not is_large(held):
            yield functools.partial(_put_tensor, held, held.detach().clone())
    elif isinstance(held, np.ndarray):
        if held.flags.writeable and held.dtype != object:
            yield functools.partial(operator.setitem, held, ..., held.copy())
    elif isinstance(held, bytearray):
        yield functools.partial(held.__setitem__, slice(None), bytes(held))
    elif isinstance(held, (io.StringIO, io.BytesIO)):
        stream: Any = held
        yield functools.partial(stream.__setstate__, stream.__getstate__())
    elif isinstance(held, types.FunctionType):
        for cell in () if is_global(held) else held.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield functools.partial(setattr, cell, "cell_contents", cell.cell_contents)
        return
    own = attributes(held)
    if own is not None:
        yield functools.partial(_put_items, own, dict(own))
        for name in slots(held):
            yield functools.partial(setattr, held, name, getattr(held, name))


LARGE = 1 << 20
"""Bytes beyond which a tensor or an array that is no buffer is taken for data: shared and not to be changed."""


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor is taken for data."""
    return tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > LARGE


def _seeding(held: Any) -> Callable[[int], Any] | None:
    """Return what seeds a generator of random numbers, None for anything else."""
    if isinstance(held, torch.Generator):
        return held.manual_seed
    if isinstance(held, random.Random):
        return held.seed
    if isinstance(held, np.random.Generator):
        bits: Any = held.bit_generator
        return lambda seed: setattr(bits, "state", type(bits)(seed).state)
    if isinstance(held, np.random.RandomState):
        return lambda seed: held.seed(seed % (1 << 32))
    return None


def _put_items(held: dict[Any, Any], kept: dict[Any, Any]) -> None:
    if not (_same(held, kept) and _same(held.values(), kept.values())):
        held.clear()
        held.update(kept)


def _put_hooks(held: Tensor, *kept: dict[Any, Any]) -> None:
    for table, before in zip(hooks(held), kept, strict=True):
        _put_items(table, before)


def _put_parts(held: Any, kept: Any) -> None:
    if held != kept if isinstance(held, set) else not _same(held, kept):
        held.clear()
        (held.update if isinstance(held, set) else held.extend)(kept)


def _same(now: Collection[Any], kept: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(now) == len(kept) and all(map(operator.is_, now, kept))


def _put_tensor(held: Tensor, kept: Tensor) -> None:
    if held.shape != kept.shape:
        held.data = kept.clone()
    elif not torch.equal(held.detach(), kept):
        held.detach().copy_(kept)
