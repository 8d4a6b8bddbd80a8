"""A client's own copy of a network: nothing that training may change is shared with the original, or it is refused by name."""

from __future__ import annotations

import copy
import io
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.clients.graph import EXACT_ATOMS, LARGE, Step, attributes, hooks, is_data, is_flat, is_global, is_large, readable, walk
from fedlight.core.errors import ConfigurationError

_LOCKS: dict[type, Callable[[], Any]] = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}
"""What a copy has a new one of."""


def own_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network that shares with it only data, classes and functions that refer to nothing of it.

    Functions within it that mean the original (``lambda x: self.scale * x``) and weak references mean the copy there, locks are new ones,
    and large tensors and arrays that are no buffers are shared, because they are data.

    Raises:
        ConfigurationError: naming what cannot be copied, or what the copy still shares with the original.
    """
    name = type(network).__name__
    found = list(walk(network, name))
    memo = _plain_copies(found)
    functions: dict[int, tuple[types.FunctionType, types.FunctionType]] = {}  # the old one and the new one, by that of the new one
    cells: dict[int, types.CellType] = {}
    kept = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    for step in found:
        held = step[2]
        if id(held) in memo:
            continue
        if _read_once(held):
            raise _refusal(step, "which can be read only once: make it where it is read, such as in `training_step`, or make it a list")
        elif type(held) in _LOCKS:
            memo.setdefault(id(held), _LOCKS[type(held)]())
        elif type(held) is threading.Condition:
            lock: Any = held._lock  # type: ignore[attr-defined]
            memo[id(held)] = threading.Condition(memo.setdefault(id(lock), _LOCKS[type(lock)]()))
        elif is_data(held) or (isinstance(held, io.IOBase) and not isinstance(held, (io.StringIO, io.BytesIO))):
            memo[id(held)] = held
        elif isinstance(held, Tensor) and held.layout not in (torch.strided, torch.sparse_coo):
            memo[id(held)] = held.detach().clone()  # torch has no deep copy of it
        elif isinstance(held, Tensor) and id(held) not in kept:
            if not held.is_leaf:  # derived from weights, by a hook that derives it again
                memo[id(held)] = held.detach().clone()
            elif is_large(held) and not held.requires_grad:
                memo[id(held)] = held
        elif isinstance(held, np.ndarray) and held.nbytes > LARGE and held.dtype != object:
            memo[id(held)] = view = held.view()
            view.flags.writeable = False
        elif isinstance(held, types.FunctionType) and not is_global(held):
            memo[id(held)] = twin = _twin(held, cells)
            functions[id(twin)] = held, twin
    shared = {key for key, made in memo.items() if id(made) == key}
    made: nn.Module = _deep(network, memo, found)
    for parameter in network.parameters():
        _copy_hooks(parameter, memo.get(id(parameter)), memo, found)
    # Variables of those that are in the copy are empty yet; other functions are in what copies leave out.
    while functions and (missing := [functions[id(held)] for _, _, held in walk(made, "") if id(held) in functions]):
        for old, new in missing:
            functions.pop(id(new))
            for was, cell in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
                with suppress(ValueError):  # an empty one stays empty
                    cell.cell_contents = _content(was.cell_contents, memo, found, shared)
            new.__defaults__, new.__kwdefaults__ = _deep(old.__defaults__, memo, found), _deep(old.__kwdefaults__, memo, found)
            new.__dict__.update(_deep(old.__dict__, memo, found))
    if any(isinstance(held, weakref.ref) for _, _, held in found):
        _turn_weak_references(made, memo)
    _check(made, found, shared, name)
    return made


def _plain_copies(found: list[Step]) -> dict[int, Any]:
    """Return copies, by id, of containers of what cannot change and of other such containers: large tables, at little cost each.

    Others, such as those in a circle, are left to ``copy.deepcopy``.
    """
    made: dict[int, Any] = {}
    for _, _, held in reversed(found):  # what is held mostly comes after its holder
        kind = type(held)
        if is_flat(held):
            made[id(held)] = held if kind in (tuple, frozenset) else held.copy()
        elif kind in (dict, list, tuple) and isinstance(held, (dict, list, tuple)):
            parts = held.values() if isinstance(held, dict) else held
            if kind is dict and not EXACT_ATOMS.issuperset(map(type, held)):
                continue
            if all(map(made.__contains__, map(id, [one for one in parts if type(one) not in EXACT_ATOMS]))):
                copied = [made.get(id(one), one) for one in parts]
                made[id(held)] = dict(zip(held, copied, strict=True)) if kind is dict else kind(copied)
    return made


def require_own(optimizer: Optimizer, network: nn.Module) -> None:
    """Raise ``ConfigurationError`` unless everything that an optimizer steps is a parameter of the client's network."""
    own = {id(parameter) for parameter in network.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise ConfigurationError(
                    f"Expected `configure_optimizers` of {type(network).__name__} to step parameters of the module itself but one of shape "
                    f"{list(parameter.shape)} is none of them, so that clients would share it: take it from `self`, or make it a part of "
                    "the module"
                )


def _copy_hooks(parameter: nn.Parameter, twin: nn.Parameter | None, memo: dict[int, Any], found: list[Step]) -> None:
    """Give a copied parameter the hooks that torch leaves out of copies."""
    of_gradient, after = hooks(parameter)
    if twin is not None and twin is not parameter:
        for hook in of_gradient.values():
            twin.register_hook(_deep(hook, memo, found))  # type: ignore[no-untyped-call]
        for hook in after.values():
            twin.register_post_accumulate_grad_hook(_deep(hook, memo, found))  # type: ignore[no-untyped-call]


def _read_once(held: object) -> bool:
    """Whether an object is used up by being read: an iterator that cannot be put back, or a file that is open for reading."""
    if isinstance(held, io.IOBase):
        return not isinstance(held, (io.StringIO, io.BytesIO)) and held is not sys.stdin and not held.closed and held.readable()
    return isinstance(held, Iterator) and attributes(held) is None


def _content(held: Any, memo: dict[int, Any], found: list[Step], shared: set[int]) -> Any:
    """Return a copy of what a function's variable holds; what cannot be copied is shared, unless it holds on to the network."""
    try:
        return copy.deepcopy(held, memo)
    except Exception as error:
        reached = list(walk(held, ""))
        if any(isinstance(part, (nn.Module, Tensor)) and id(part) in memo for _, _, part in reached):
            step = next(step for step in found if step[2] is held)
            raise _refusal(step, f"which cannot be copied ({error}) and holds on to the network: make it where it is used") from error
        shared |= {id(part) for _, _, part in reached}
        return held


def _twin(function: types.FunctionType, cells: dict[int, types.CellType]) -> types.FunctionType:
    """Return the same function with variables of its own, empty yet; functions that share a variable go on sharing it."""
    own = [cells.setdefault(id(cell), types.CellType()) for cell in function.__closure__ or ()]
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(own))
    made.__qualname__, made.__doc__, made.__module__ = function.__qualname__, function.__doc__, function.__module__
    return made


def _deep(held: Any, memo: dict[int, Any], found: list[Step]) -> Any:
    try:
        return copy.deepcopy(held, memo)
    except Exception as error:  # whatever the copy of a part raises: it is named
        for step in reversed(found):  # the innermost first
            part = step[2]
            if isinstance(part, (nn.Module, Tensor)):
                continue
            try:
                copy.deepcopy(part, dict(memo))
            except Exception:
                raise _refusal(step, f"which cannot be copied ({error}): make it where it is used, or outside of the module") from error
        raise


def _refusal(step: Step, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"Expected a network that every client can have a copy of but {readable(step)} is of type {type(step[2]).__name__}, {why}"
    )


def _turn_weak_references(made: nn.Module, memo: dict[int, Any]) -> None:
    """Make weak references to parts of the original mean the same parts of the copy."""

    def turned(held: Any) -> Any:
        target = held() if isinstance(held, weakref.ref) else None
        return weakref.ref(memo[id(target)]) if target is not None and id(target) in memo and memo[id(target)] is not target else held

    for _, _, held in list(walk(made, "")):
        if isinstance(held, dict):
            held.update({key: new for key, value in held.items() if (new := turned(value)) is not value})
        elif isinstance(held, (list, deque)):
            for at, value in enumerate(held):
                held[at] = turned(value)
        elif (own := getattr(held, "__dict__", None)) is not None and isinstance(own, dict) and not isinstance(held, type):
            own.update({key: new for key, value in own.items() if (new := turned(value)) is not value})


def _check(made: nn.Module, found: list[Step], shared: set[int], name: str) -> None:
    """Refuse a copy that still holds a module, a tensor or a function of the original that could carry something from client to client."""
    original = {
        id(held) for _, _, held in found if isinstance(held, (nn.Module, Tensor, np.ndarray, list, dict, set)) and id(held) not in shared
    }
    for step in walk(made, name):
        held = step[2]
        if id(held) in original and not (isinstance(held, (list, dict, set)) and not held):
            raise _refusal(step, "and still the original's in a copy: hold it in an attribute, without `__deepcopy__` of its own")
