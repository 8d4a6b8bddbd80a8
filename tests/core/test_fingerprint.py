"""Text of settings: equal values make equal text, in any process, and different ones do not."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedlight.core.fingerprint import LONGEST, describe, describe_network
from tests.federation import environment


class Node:
    """A setting whose parts know what they are parts of."""

    def __init__(self, **parts) -> None:
        self.parts, self.parent = parts, None
        for part in parts.values():
            if isinstance(part, Node):
                part.parent = self


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a) -> None:
        self.a = a


class Shows(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self):
        return f"function={self.function}"


def scaled(factor):
    return lambda x: x * factor


def itself():
    found = [1]
    found.append(found)
    return found


MAKERS = {
    "numbers": lambda: {"a": 1, "b": [0.5, None, True]},
    "another number": lambda: {"a": 2, "b": [0.5, None, True]},
    "a tree": lambda: Node(model=Node(width=3), data=Node(size=2)),
    "another tree": lambda: Node(model=Node(width=4), data=Node(size=2)),
    "slots": lambda: Slotted(1),
    "other slots": lambda: Slotted(2),
    "a set": lambda: {"a", "b", "c"},
    "another set": lambda: {"a", "b"},
    "an array": lambda: np.arange(1000),
    "another array": lambda: np.arange(1000) + 1,
    "strings in an array": lambda: np.array(["a", "b"]),
    "a tensor": lambda: torch.arange(5.0),
    "another tensor": lambda: torch.arange(5.0) + 1,
    "a lambda": lambda: lambda x: x,
    "another lambda": lambda: lambda x: x + 1,
    "a closure": lambda: scaled(2),
    "another closure": lambda: scaled(3),
    "a partial": lambda: partial(torch.optim.SGD, lr=0.1),
    "another partial": lambda: partial(torch.optim.SGD, lr=0.2),
    "itself": itself,
    "many words": lambda: {f"word {i}": i for i in range(3000)},
    "many other words": lambda: {f"word {i}": i + 1 for i in range(3000)},
    "mixed keys": lambda: {1: "a", "b": (2, 3), (4, 5): Slotted(1)},
    "a lock": threading.Lock,
    "a shape": lambda: torch.Size([2, 3]),
    "a device": lambda: torch.device("cpu"),
}


def test_equal_values_make_equal_text_and_different_ones_do_not():
    texts = {name: describe(make()) for name, make in MAKERS.items()}
    assert texts == {name: describe(make()) for name, make in MAKERS.items()}
    assert len({*texts.values()}) == len(texts)
    assert not any(" at 0x" in text for text in texts.values()) and max(map(len, texts.values())) < LONGEST + 200


def test_text_is_the_same_in_another_process():
    names = [name for name in MAKERS if name != "a lock"]
    code = (
        "from fedlight.core.fingerprint import describe\n"
        "from tests.core.test_fingerprint import MAKERS\n"
        f"print(*[describe(MAKERS[name]()) for name in {names}], sep='\\n')"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment() | {"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout.splitlines() == runs[1].stdout.splitlines() == [describe(MAKERS[name]()) for name in names], runs[0].stderr


@pytest.mark.parametrize("make", [lambda: np.random.default_rng(0), torch.Generator, lambda: iter(x for x in [1])])
def test_what_moves_while_it_is_used_goes_by_its_class(make):
    one = make()
    before = describe({"given": one, "n": Slotted(one)})
    if isinstance(one, np.random.Generator):
        one.random(5)
    assert describe({"given": one, "n": Slotted(one)}) == before


def test_a_network_goes_by_its_layers_and_their_functions_and_not_by_where_they_lie():
    def text(width=3, function=lambda: scaled(2)):
        return describe_network(nn.Sequential(nn.Linear(width, 2), Shows(function())))

    assert text() == text() and " at 0x" not in text()
    assert len({text(), text(width=4), text(function=lambda: scaled(3)), text(function=lambda: abs)}) == 4
