"""Engines in a run: the same rounds by either, refusals before anything is trained."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import fedlight
from fedlight.callbacks import FederatedCallback
from fedlight.clients import Auto, FedAvg, Scaffold, Sequential, Threaded, Vectorized
from fedlight.codecs import PowerSGDCodec, TopKCodec
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.data import Dirichlet
from fedlight.modules.engines import choose_threads
from tests.federation import FEATURES, federated, federated_data, learned, mlp, run, trainer, weights_of
from tests.processes import in_two_processes


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_rounds_are_the_same_by_either_engine(weighting: str) -> None:
    ends, orders, losses = [], [], []
    for engine in (Sequential(), Vectorized(clients=3)):
        module = federated(engine=engine, weighting=weighting, algorithm=FedAvg(lr=0.1, batch_size=8, epochs=1, momentum=0.5))
        data = federated_data(partitioner=Dirichlet(0.5))
        data.setup()
        assert len({data.client_size(client) for client in range(8)}) > 1
        spy = run(module, data=data)
        ends.append(weights_of(module))
        orders.append(spy.clients)
        losses.append([reply.simulation.loss for reply in spy.replies.values()])
    way = float((ends[0] - weights_of(mlp())).norm())
    assert float((ends[0] - ends[1]).norm()) <= 1e-5 * way
    assert orders[0] == orders[1] and all(order == sorted(order) for order in orders[1].values())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


RUNS: dict[str, Any] = {
    "dropout": lambda: {"network": mlp(dropout=0.5)},
    "batch norm, by samples": lambda: {"network": mlp(norm=True), "weighting": "samples"},
    "batch norm at home": lambda: {"network": mlp(norm=True), "batch_norm": "local"},
    "control variates": lambda: {"algorithm": Scaffold(lr=0.1, steps=3, batch_size=8)},
    "learned code": lambda: {"codec": learned()},
    "two passes": lambda: {"codec": PowerSGDCodec(1)},
    "clients remember": lambda: {"codec": TopKCodec(4)},
    "states in files": lambda: {"codec": TopKCodec(4), "client_memory_mb": 0.0},
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("case", RUNS)
def test_rounds_in_threads_are_those_of_one_client_after_another_bit_for_bit(case: str) -> None:
    ends = []
    for engine in (Sequential(), Threaded(3)):
        module = federated(engine=engine, **RUNS[case]())
        spy = run(module, rounds=3)
        ends.append((weights_of(module), spy.totals, spy.clients, module.store.state_dict()))
    (weights, totals, clients, states), (weights_too, totals_too, clients_too, states_too) = ends
    assert torch.equal(weights, weights_too) and clients == clients_too
    assert all(torch.equal(totals[number], totals_too[number]) for number in range(3))
    assert same(states, states_too)


def same(first: Any, second: Any) -> bool:
    """Whether nested dicts hold the same tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


class Spoils(FederatedCallback):
    """Makes every client's first attempt unusable, in some rounds."""

    def on_client_update(self, trainer: Any, pl_module: Any, context: Any, update: Any) -> None:
        if context.attempt == 0 and context.round == 1:
            raise MessageError("not this time")


def test_attempts_that_fail_in_threads_leave_nothing_of_clients_behind() -> None:
    ends = []
    for engine in (Sequential(), Threaded(3)):
        module = federated(engine=engine, algorithm=Scaffold(lr=0.1, steps=3, batch_size=8))
        run(module, rounds=3, callbacks=[Spoils()])
        ends.append((weights_of(module), module.store.state_dict()))
    assert torch.equal(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])


class Breaks(FederatedCallback):
    """Fails between two clients, as a callback with a mistake does."""

    def on_client_message(self, trainer: Any, pl_module: Any, round: Any, reply: Any) -> None:
        raise ZeroDivisionError("in a callback")


def test_an_error_between_two_clients_ends_the_others_and_puts_everything_back() -> None:
    """Also while somebody holds the traceback, with all that was suspended in it."""
    module, threads = federated(mlp(dropout=0.5), engine=Threaded(2)), torch.get_num_threads()
    noise = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError) as held:
            trainer(1, callbacks=[Breaks()]).fit(module, datamodule=federated_data())
        assert held.value.__traceback__ is not None
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fedlight-train")] == []
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), noise)
    finally:
        torch.set_num_threads(threads)


def test_a_second_fit_takes_the_same_engine() -> None:
    engine, ends = Threaded(2), []
    for _ in range(2):
        module = federated(mlp(dropout=0.5), engine=engine)
        run(module)
        ends.append(weights_of(module))
    assert torch.equal(*ends)


@pytest.mark.parametrize("engine", [Vectorized(clients=8), Threaded(3)], ids=["vectorized", "threaded"])
def test_a_client_that_is_not_finite_is_dropped_alone(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = federated_data()
    data.setup()
    data.x[data.train_partition[3][0]] = float("nan")
    module = federated(engine=engine)
    spy = run(module, rounds=1, data=data)
    assert spy.clients[0] == [0, 1, 2, 4, 5, 6, 7]
    assert "client 3 was dropped" in caplog.text and torch.isfinite(weights_of(module)).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"network": mlp(dropout=0.5)}, "`network`"),
        ({"network": mlp(norm=True)}, "`network`"),
        ({"network": mlp(norm=True), "batch_norm": "local"}, "`batch_norm`"),
        ({"algorithm": Scaffold(steps=2)}, "`algorithm`"),
    ],
    ids=["dropout", "batch norm", "local batch norm", "scaffold"],
)
def test_what_cannot_be_vectorised_is_refused_before_the_codec_is_trained(changes: dict[str, Any], named: str) -> None:
    module = federated(engine=Vectorized(), codec=learned(), **changes)
    with pytest.raises(ConfigurationError, match=f"{named}.*`engine` Vectorized.*engine Sequential"):
        run(module, rounds=1)
    assert not module.codec.fitted


def test_a_lightning_module_is_refused() -> None:
    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 3)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    for algorithm, named in ((FedAvg(steps=1), "`loss`"), (None, "`algorithm`")):
        for engine, refused in ((Vectorized(), named), (Threaded(), "`loss`")):
            module = federated(Own(), engine=engine, algorithm=algorithm)
            with pytest.raises(ConfigurationError, match=f"{refused}.*engine Sequential"):
                trainer(1).fit(module, datamodule=federated_data())


def test_a_run_goes_on_with_another_engine(tmp_path: Any) -> None:
    def fit(engine: Any, rounds: int, **resume: Any) -> tuple[Any, Any]:
        module = federated(engine=engine)
        used = trainer(rounds)
        used.fit(module, datamodule=federated_data(), **resume)
        return used, module

    _, whole = fit(Sequential(), 2)
    half, _ = fit(Sequential(), 1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(Threaded(3), 2, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    _, resumed = fit(Vectorized(3), 2, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert float((weights_of(resumed) - weights_of(whole)).norm()) <= 1e-5 * float((weights_of(whole) - weights_of(mlp())).norm())


class OwnLoss(nn.CrossEntropyLoss):
    """A user's own, which may change itself for all that anybody knows."""


def chosen_by(module: Any, **changes: Any) -> str:
    """Run, and return the engine that was chosen."""
    run(module, **changes)
    assert isinstance(module.engine, Auto)
    return module.engine.chosen


@pytest.mark.parametrize("case", ["dropout", "control variates", "states in files"])
def test_a_run_with_a_trial_is_the_one_that_names_its_engine_bit_for_bit(case: str) -> None:
    module = federated(**RUNS[case]() | {"engine": None})
    chosen = chosen_by(module, rounds=3)
    named = federated(**RUNS[case]() | {"engine": getattr(fedlight, chosen)()})
    run(named, rounds=3)
    assert torch.equal(weights_of(module), weights_of(named)) and same(module.store.state_dict(), named.store.state_dict())


def test_a_loss_of_the_user_s_own_is_tried_with_no_other_engine() -> None:
    module = federated(engine=None, loss=OwnLoss())
    assert chosen_by(module) == "Sequential" and list(module.engine.candidates) == ["Sequential"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Threaded", "Vectorized"])
def test_a_resumed_run_goes_on_with_the_engine_of_its_checkpoint(name: str, tmp_path: Any) -> None:
    half = trainer(1)
    half.fit(federated(engine=getattr(fedlight, name)()), datamodule=federated_data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    module = federated(engine=None)
    trainer(2).fit(module, datamodule=federated_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert isinstance(module.engine, Auto)
    assert module.engine.chosen == (name if name in module.engine.candidates else "Sequential")


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path: Any) -> None:
    def work() -> str:
        return chosen_by(federated(engine=None), devices=2, strategy="ddp")

    first, second = in_two_processes(work, tmp_path)
    assert first == second and first


@pytest.mark.parametrize(("width", "threads"), [(8, 1), (200_000, None)], ids=["small", "large"])
def test_a_small_lightning_module_takes_one_thread(width: int, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps cannot be tried, and more threads stand still whenever another program wants a core."""

    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, width)

    module = federated(Own())
    module.trainer = trainer(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("fedlight.modules.engines.cores_of_a_process", lambda: 2)
    assert choose_threads(module) == threads
