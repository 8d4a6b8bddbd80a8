"""A client's model shares nothing with anybody's, and begins as it was made whatever the client before did to it (law 5)."""

from __future__ import annotations

import collections
import cProfile
import functools
import io
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlight.clients import ClientOptimizer, LocalModel
from fedlight.clients.copying import own_copy
from fedlight.clients.engine import ClientTask, Sequential
from fedlight.clients.graph import LARGE
from fedlight.clients.memento import Memento
from fedlight.core.errors import ConfigurationError

Steps = Callable[["Net"], Any]


class Slotted:
    __slots__ = ("number", "owner")

    def __init__(self, owner: Any = None) -> None:
        self.number, self.owner = 0, owner


class Record:
    def __init__(self) -> None:
        self.values: list[float] = []


class Net(nn.Module):
    """A layer, and whatever ``make`` adds; ``use`` is called in every forward pass and returns a factor on the output."""

    def __init__(self, make: Steps = lambda net: None, use: Steps = lambda net: 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.use = use
        make(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.use(self)


def assign(**what: Any) -> Steps:
    return lambda net: [setattr(net, name, value) for name, value in what.items()] and None


def count(holder: Any, name: Any) -> float:
    """Count one more in a place, and return the count."""
    if isinstance(holder, (dict, list, np.ndarray)):
        holder[name] += 1
        return float(holder[name])
    setattr(holder, name, getattr(holder, name) + 1)
    return float(getattr(holder, name))


def append(values: Any) -> float:
    (values.add if isinstance(values, set) else values.append)(float(len(values)))
    return float(len(values))


def closure(net: Net) -> None:
    steps = 0

    def use() -> float:
        nonlocal steps
        steps += 1
        return float(steps)

    net.counted = use


def hooked(net: Net) -> None:
    seen: list[int] = []
    net.layer.register_forward_hook(lambda layer, inputs, output: seen.append(1) or output * len(seen))


def replaced(net: Net) -> float:
    net.layer.register_forward_hook(lambda layer, inputs, output: output * 1.5)
    return 1.0


def ended(net: Net) -> float:
    was = net.drop.training
    net.drop.eval()
    return 1.0 + was


def swapped(net: Net) -> float:
    was = isinstance(net.other, nn.Identity)
    net.other = nn.Hardtanh()
    return 1.0 + was


def frozen(net: Net) -> float:
    was = net.layer.bias.requires_grad
    net.layer.bias.requires_grad_(False)
    return 1.0 + was


DRAWN: list[float] = []

STATE: dict[str, tuple[Steps, Steps]] = {
    "a number": (assign(calls=0), lambda net: count(net, "calls")),
    "a new attribute": (assign(), lambda net: count(net.__dict__.setdefault("made", {"n": 0}), "n")),
    "a list": (lambda net: assign(seen=[])(net), lambda net: append(net.seen)),
    "a deque": (lambda net: assign(seen=collections.deque(maxlen=3))(net), lambda net: append(net.seen)),
    "a set": (lambda net: assign(seen=set())(net), lambda net: append(net.seen)),
    "nested dicts": (lambda net: assign(deep={"a": [{"b": 0}]})(net), lambda net: count(net.deep["a"][0], "b")),
    "a plain object": (lambda net: assign(record=Record())(net), lambda net: append(net.record.values)),
    "slots": (lambda net: assign(slotted=Slotted())(net), lambda net: count(net.slotted, "number")),
    "a tensor": (lambda net: assign(total=torch.zeros(1))(net), lambda net: float(net.total.add_(1))),
    "a tensor's data": (lambda net: assign(total=torch.zeros(1))(net), lambda net: float(net.total.data.add_(1))),
    "a tensor in a list": (lambda net: assign(totals=[torch.zeros(1)])(net), lambda net: float(net.totals[0].add_(1))),
    "an array": (lambda net: assign(total=np.zeros(2))(net), lambda net: count(net.total, 0)),
    "a buffer": (lambda net: net.register_buffer("n", torch.zeros(())), lambda net: float(net.n.add_(1))),
    "a loose buffer": (lambda net: net.register_buffer("n", torch.zeros(()), persistent=False), lambda net: count(net, "n")),
    "a torch generator": (
        lambda net: assign(rng=torch.Generator().manual_seed(1))(net),
        lambda net: float(torch.rand((), generator=net.rng)),
    ),
    "a Python generator": (lambda net: assign(rng=random.Random(1))(net), lambda net: net.rng.random()),
    "a NumPy generator": (lambda net: assign(rng=np.random.default_rng(1))(net), lambda net: net.rng.random()),
    "an old NumPy generator": (lambda net: assign(rng=np.random.RandomState(1))(net), lambda net: net.rng.rand()),
    "a function's variable": (closure, lambda net: net.counted()),
    "a hook's variable": (hooked, lambda net: 1.0),
    "a hook that is added": (assign(), replaced),
    "a layer's option": (
        lambda net: net.add_module("drop", nn.Dropout(0.0)),
        lambda net: count(net.drop, "p") and float(net.drop.p),
    ),
    "a mode": (lambda net: net.add_module("drop", nn.Dropout(0.5)), ended),
    "a frozen weight": (
        lambda net: net.register_parameter("still", nn.Parameter(torch.zeros(1), requires_grad=False)),
        lambda net: float(net.still.data.add_(1)),
    ),
    "a layer that is replaced": (lambda net: net.add_module("other", nn.Identity()), swapped),
    "whether a weight is trained": (assign(), frozen),
    "a partial": (lambda net: assign(more=functools.partial(count, {"n": 0}, "n"))(net), lambda net: net.more()),
    "an event": (
        lambda net: assign(done=threading.Event())(net),
        lambda net: 2.0 if net.done.is_set() else float(bool(net.done.set())) + 1,
    ),
}


def updates(net: nn.Module, order: list[int]) -> dict[int, Tensor]:
    """Return each client's update, trained one after another in this order."""
    model = LocalModel(net, lambda network, x, y: (network(x)[:, 0] - y).square().mean())
    start = model.weights.clone()
    algorithm = ClientOptimizer(lambda parameters: torch.optim.SGD(parameters, 0.01), steps=3, batch_size=4)
    tasks = []
    for client in order:
        g = torch.Generator().manual_seed(client)
        x, y = torch.randn(8, 3, generator=g), torch.randn(8, generator=g)
        tasks.append(ClientTask(client, x, y, start, model.buffers.clone(), g, noise=100 + client))
    return {task.client: result.update for task, result, _ in Sequential().train(model, algorithm, tasks, 0)}


@pytest.mark.parametrize("name", STATE)
def test_a_clients_update_depends_on_nothing_another_client_did(name: str) -> None:
    make, use = STATE[name]
    net = Net(make, use)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    together, alone = updates(net, [0, 1, 2]), {client: updates(Net(make, use), [client])[client] for client in (0, 1, 2)}
    assert all(torch.equal(together[client], alone[client]) for client in alone)
    assert all(torch.equal(updates(net, [2, 0, 1])[client], alone[client]) for client in alone)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_what_is_read_twice_differs_from_client_to_client() -> None:
    """A generator that the network holds is no constant: clients draw numbers of their own."""
    DRAWN.clear()
    make, use = assign(rng=torch.Generator().manual_seed(1)), lambda net: DRAWN.append(float(torch.rand((), generator=net.rng))) or 1.0
    updates(Net(make, use), [0, 1])
    assert len(set(DRAWN)) == 6


# -- names inside mean the copy --------------------------------------------------------------------------------------


def wrapped(net: Net) -> None:
    own = net.layer.forward

    @functools.wraps(own)
    def forward(x: Tensor) -> Tensor:
        return 2 * own(x)

    net.layer.forward = forward  # type: ignore[method-assign]


NAMES: dict[str, tuple[Steps, Steps]] = {
    "a lambda": (lambda net: assign(act=lambda: net.layer.weight.sum())(net), lambda net: net.act()),
    "a default": (lambda net: assign(act=lambda layer=net.layer: layer.weight.sum())(net), lambda net: net.act()),
    "a method": (lambda net: assign(act=net.layer.forward)(net), lambda net: net.act(torch.ones(3))),
    "a wrapped method": (wrapped, lambda net: 1.0),
    "a partial": (lambda net: assign(act=functools.partial(nn.Linear.forward, net.layer))(net), lambda net: net.act(torch.ones(3))),
    "a weak reference": (lambda net: assign(act=weakref.ref(net.layer))(net), lambda net: net.act().weight.sum()),
    "a hook": (lambda net: net.layer.register_forward_hook(lambda *_: net.layer.weight.sum()) and None, lambda net: 1.0),
    "an object": (lambda net: assign(act=Slotted(net.layer))(net), lambda net: net.act.owner.weight.sum()),
    "a parent": (lambda net: net.layer.__dict__.update(parent=net), lambda net: net.layer.parent.layer.weight.sum()),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_inside_mean_the_copy(name: str) -> None:
    """The gradient is that of the copy's weights: the original has none, and does not move with them."""
    net = Net(*NAMES[name])
    made = own_copy(net)
    with torch.no_grad():
        made.layer.weight.add_(1)
    made(torch.ones(1, 3)).sum().backward()
    assert made.layer.weight.grad is not None and net.layer.weight.grad is None
    expected = Net(*NAMES[name])
    with torch.no_grad():
        expected.layer.weight.add_(1)
    expected(torch.ones(1, 3)).sum().backward()
    assert torch.equal(made(torch.ones(1, 3)), expected(torch.ones(1, 3))) and torch.equal(
        made.layer.weight.grad, expected.layer.weight.grad
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_derived_weights_are_derived_again(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))
    made = updates(net, [0, 1])
    assert torch.equal(made[1], updates(net, [1])[1]) and made[0].any()


# -- what cannot be copied, and what need not be -----------------------------------------------------------------------


def test_locks_and_what_is_written_to_are_no_obstacle(tmp_path) -> None:
    with (tmp_path / "log").open("w") as log:
        make = lambda net: assign(lock=threading.Lock(), again=threading.RLock(), log=log, text=io.StringIO())(net)  # noqa: E731
        net = Net(make, lambda net: net.lock.acquire() and not net.lock.release() and 1.0)
        made = own_copy(net)
        assert made.lock is not net.lock and made.log is net.log
        assert len(updates(net, [0, 1])) == 2


class Stubborn:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")


class Selfish:
    def __init__(self) -> None:
        self.values = [1]

    def __deepcopy__(self, memo: Any) -> Any:
        return self


REFUSED: dict[str, tuple[Callable[[Net], Any], str]] = {
    "a generator": (lambda net: assign(lines=(i for i in range(3)))(net), "Net.lines is of type generator, which can be read only once"),
    "an iterator": (lambda net: assign(lines=iter([1, 2]))(net), "Net.lines is of type list_iterator, which can be read only once"),
    "one of a list": (lambda net: assign(parts={"a": [iter(())]})(net), r"Net.parts\['a'\]\[0\] is of type tuple_iterator"),
    "in a layer": (lambda net: net.layer.__dict__.update(odd=Stubborn()), "Net.layer.odd is of type Stubborn.*not this one"),
    "one that copies nothing": (lambda net: assign(odd=Selfish())(net), "Net.odd.values is of type list, and still the original's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_is_refused_by_name(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ConfigurationError, match=reason):
        own_copy(Net(make))


def test_a_file_that_is_read_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "lines").write_text("a\nb\n")
    with (tmp_path / "lines").open() as file, pytest.raises(ConfigurationError, match="Net.file is of type TextIOWrapper.*`training_step`"):
        own_copy(Net(assign(file=file)))


def test_data_is_shared_and_not_to_be_changed() -> None:
    data = {
        "big": torch.zeros(LARGE),
        "array": np.zeros(LARGE),
        "set": torch.utils.data.TensorDataset(torch.zeros(3)),
        "small": torch.zeros(3),
    }
    net = Net(assign(**data))
    made = own_copy(net)
    assert made.big is net.big and np.shares_memory(made.array, net.array) and made.set is net.set and made.small is not net.small
    with pytest.raises(ValueError, match="read-only"):
        made.array[0] = 1
    memento = Memento(made)
    memento.put_back()
    made.big[0] = 1
    with pytest.raises(ConfigurationError, match="leave Net.big as it is.*register it as a buffer"):
        memento.put_back()


def calls(words: int) -> int:
    """Return how many functions are called to copy a network with a vocabulary, and to put it back twice."""
    names = [f"word {i}" for i in range(words)]
    pairs = {(name, "s"): number for number, name in enumerate(names)}
    net = Net(assign(numbers=dict.fromkeys(names, 0), names=names, pairs=pairs, counts=collections.Counter(names)))
    with cProfile.Profile() as profile:
        made = own_copy(net)
        memento = Memento(made)
        memento.put_back()
        memento.put_back()
    assert made.numbers == net.numbers is not made.numbers and made.pairs == net.pairs is not made.pairs
    return sum(entry.callcount for entry in profile.getstats())


def test_a_large_vocabulary_is_not_walked_word_by_word() -> None:
    few, many = calls(10), calls(1000)
    assert many < few + 100


@pytest.mark.parametrize(("make", "most"), [(own_copy, 20), (Memento, 8)])
def test_a_table_of_lists_costs_few_calls_a_list(make: Callable[[nn.Module], object], most: int) -> None:
    def count(lists: int) -> int:
        net = Net(assign(table={n: [n, [n]] for n in range(lists // 2)}))
        with cProfile.Profile() as profile:
            make(net)
        return sum(entry.callcount for entry in profile.getstats() if not isinstance(entry.code, str))  # not those of C

    assert count(2200) - count(200) <= 2000 * most


def test_tables_within_tables_are_copied_and_put_back_with_what_they_share() -> None:
    shared = [1, 2]
    around: list[Any] = [shared]
    around.append(around)
    net = Net(assign(table={"a": {"b": [shared, (shared, 3)], ("k", 1): [[]]}, "again": shared}, around=around, keys={(1, (2,)): [shared]}))
    made = own_copy(net)
    assert made.table == net.table and made.keys == net.keys
    mine = made.table["again"]
    assert mine is not shared
    holders = [made.table["a"]["b"][0], made.table["a"]["b"][1][0], made.around[0], made.keys[1, (2,)][0]]
    assert all(one is mine for one in holders) and made.around[1] is made.around
    memento = Memento(made)
    mine.append(3)
    made.table["a"]["b"].reverse()
    made.table["a"]["k", 1].append(4)
    memento.put_back()
    assert made.table == net.table and made.table["a"]["b"][0] is mine


def test_an_optimizer_of_anything_else_than_the_clients_weights_is_refused() -> None:
    class Own(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([*self.parameters(), loose], 0.1)

    loose = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigurationError, match=r"one of shape \[2\] is none of them"):
        ClientOptimizer(steps=1).make(Own())
