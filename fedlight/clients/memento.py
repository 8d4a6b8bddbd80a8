"""What a network and all that it holds are like, noted to be put back: a client leaves nothing to the next."""

from __future__ import annotations

import functools
import io
import operator
import random
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.clients.graph import CONTAINERS, attributes, hooks, is_global, is_large, readable, walk
from fedlight.core.errors import ConfigurationError
from fedlight.core.fingerprint import slots

Restore = Callable[[], None]


class Memento:
    """What a network and all that it holds are like now, to be put back in place later: the same objects, with what they held.

    Weights and buffers are left to others, as are data sets, classes and variables of modules (``import``), which everything shares.
    """

    def __init__(self, network: nn.Module) -> None:
        left = {id(table) for layer in network.modules() for table in (layer._parameters, layer._buffers)}
        left |= {id(t) for t in (*network.parameters(), *network.buffers())}
        # What was noted must live on, or another object might take its address.
        self._noted: list[Any] = []
        self._contents: list[tuple[Callable[[Any, Any], None], Any, Any]] = []
        self._restores: list[Restore] = [functools.partial(_put_hooks, p, *map(dict, hooks(p))) for p in network.parameters()]
        self._seeds: list[Callable[[int], Any]] = []
        self._large: list[tuple[str, Tensor, int]] = []
        for step in walk(network, type(network).__name__):
            held = step[2]
            self._noted.append(held)
            if id(held) in left:
                continue
            if (put := _PUTS.get(type(held))) is not None:  # by far the most, where there are many
                self._contents.append((put, held, held.copy()))
            elif type(held) not in CONTAINERS:
                self._restores.extend(_restores(held))
                self._seeds.extend(_seeding(held))
                if isinstance(held, Tensor) and is_large(held):
                    self._large.append((readable(step), held, held._version))

    def put_back(self) -> None:
        """Put everything back as it was; raises ``ConfigurationError`` if a large tensor that is no buffer was changed."""
        for path, held, version in self._large:
            if held._version != version:
                raise ConfigurationError(
                    f"Expected training to leave {path} as it is, which is no buffer and of {held.nbytes:,} bytes, so that all clients "
                    "share it, but it was changed: register it as a buffer (with persistent=False, if it is the client's alone)"
                )
        for put, held, kept in self._contents:
            put(held, kept)
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


def _seeding(held: Any) -> Iterator[Callable[[int], Any]]:
    """Yield what seeds a generator of random numbers, nothing for anything else."""
    if isinstance(held, torch.Generator):
        yield held.manual_seed
    elif isinstance(held, random.Random):
        yield held.seed
    elif isinstance(held, np.random.Generator):
        bits: Any = held.bit_generator
        yield lambda seed: setattr(bits, "state", type(bits)(seed).state)
    elif isinstance(held, np.random.RandomState):
        yield lambda seed: held.seed(seed % (1 << 32))


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


_PUTS: Mapping[type, Callable[[Any, Any], None]] = {
    **dict.fromkeys((dict, Counter, OrderedDict), _put_items),
    **dict.fromkeys((list, deque, set), _put_parts),
}
"""What puts containers of Python's own back; those of a subclass may hold more than their items."""
