"""Encoding in a thread of its own, while the next client trains: the same bits, the same hooks in the same order, the same errors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler

from fedlight.aggregation import SecureAggregator
from fedlight.callbacks import FederatedCallback, GradientDecoder, GradientEncoder
from fedlight.callbacks.codec import TRIES, WORTH_A_THREAD
from fedlight.clients import FedAvg, Scaffold, Threaded
from fedlight.codecs import CountSketchCodec, IdentityCodec, PowerSGDCodec, QSGDCodec, QuantizeCodec, TopKCodec
from fedlight.codecs.identity import IdentityEncoder
from fedlight.core.cores import spare_cores
from fedlight.core.errors import MessageError
from fedlight.data import Poisson
from fedlight.privacy import AdaptiveClipping, CentralDP, DistributedDP
from tests.federation import Fixed, History, Spy, federated, federated_data, learned, mlp, pretraining, trainer, weights_of

CLIENTS, ROUNDS = 8, 3
WAIT = 60  # seconds after which a thread that waits for another gives up


class Hooks(FederatedCallback):
    """Remembers which hook was called for whom."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_round_start(self, trainer, pl_module, round):
        self.calls.append(("start", round.context.round, round.context.step))

    def on_client_update(self, trainer, pl_module, round, upload):
        self.calls.append(("update", upload.client))

    def on_client_message(self, trainer, pl_module, round, upload):
        self.calls.append(("message", upload.client, bytes(upload.message)))

    def on_cohort_end(self, trainer, pl_module, round):
        self.calls.append(("end", round.codes.total.tolist()))


def fit(module, beside: bool | None, rounds: int = ROUNDS, data=None, callbacks=(), **changes: Any) -> GradientEncoder:
    """Train with an encoder that works ``beside`` or not, and return it."""
    encoder = GradientEncoder(module.codec, beside)
    given = [*callbacks, pretraining(), encoder, GradientDecoder(module.codec)]
    trainer(rounds, callbacks=given, **changes).fit(module, datamodule=data or federated_data())
    return encoder


def encoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fedlight-encode")]


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "no codec": lambda: {"codec": None},
    "learned": lambda: {"codec": learned()},
    "stochastic rounding": lambda: {"codec": QSGDCodec(4)},
    "the client remembers": lambda: {"codec": TopKCodec(4)},
    "the server remembers": lambda: {"codec": CountSketchCodec(2, 1)},
    "two passes": lambda: {"codec": PowerSGDCodec(1)},
    "dropout": lambda: {"codec": QuantizeCodec(6), "network": mlp(dropout=0.5)},
    "batch norm": lambda: {"codec": QuantizeCodec(6), "network": mlp(norm=True)},
    "batch norm at home": lambda: {"codec": QuantizeCodec(6), "network": mlp(norm=True), "batch_norm": "local"},
    "control variates": lambda: {"codec": QuantizeCodec(6), "algorithm": Scaffold(lr=0.1, steps=3, batch_size=8)},
    "states in files": lambda: {"codec": TopKCodec(4), "client_memory_mb": 0.0},
    "masks": lambda: {"codec": QuantizeCodec(6), "aggregator": SecureAggregator(CLIENTS)},
}


def same(first: list[tuple[Any, ...]], second: list[tuple[Any, ...]], masked: bool) -> bool:
    """Whether two runs called the same hooks with the same messages and sums; messages under fresh masks are never the same."""
    return [call[:2] if masked else call for call in first] == [call[:2] if masked else call for call in second]


@pytest.mark.parametrize("case", RUNS)
def test_messages_sums_and_hooks_are_those_of_a_run_without_the_thread(case):
    seen = {}
    for beside in (False, True):
        module, hooks, spy = federated(**RUNS[case]()), Hooks(), Spy()
        fit(module, beside, callbacks=[hooks, spy])
        seen[beside] = hooks.calls, spy.totals, weights_of(module), module.traffic.uplink
    (calls, totals, weights, sent), (calls_beside, totals_beside, weights_beside, sent_beside) = seen[False], seen[True]
    assert same(calls, calls_beside, masked=case == "masks") and len([call for call in calls if call[0] == "message"]) >= CLIENTS * ROUNDS
    assert sent == sent_beside
    assert all(torch.equal(totals[number], totals_beside[number]) for number in range(ROUNDS))
    assert torch.equal(weights, weights_beside)


@pytest.mark.parametrize(
    "privacy",
    [
        lambda: CentralDP(clip=0.5, noise_multiplier=1.0, delta=1e-2, simulation_seed=0, adaptive=AdaptiveClipping(bit_noise=2.0)),
        lambda: DistributedDP(clip=0.5, noise_multiplier=1.0, delta=1e-2, simulation_seed=0, threshold=2),
    ],
)
def test_clipping_noise_and_clipping_bits_are_those_of_a_run_without_the_thread(privacy):
    ends = []
    for beside in (False, True):
        module = federated(codec=IdentityCodec(), privacy=privacy())
        fit(module, beside, data=federated_data(sampler=Poisson(0.7), normalize=False))
        ends.append((weights_of(module), module.privacy.norm))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


class _Watched(IdentityEncoder):
    """Does something before it encodes."""

    before: Callable[[], None]

    def encode(self, update, context, private):
        self.before()
        return super().encode(update, context, private)


class Watched(IdentityCodec):
    """Calls a function before every encoding."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self.before = before

    def config(self):
        return {"class_path": "Watched", "init_args": {}}

    def make_encoder(self, layout, plan):
        encoder = _Watched(layout, super().make_encoder(layout, plan).format)
        encoder.before = self.before
        return encoder


class Begins(FedAvg):
    """Says when a client after the first begins to train."""

    def __init__(self) -> None:
        super().__init__(lr=0.1, steps=3, batch_size=8)
        self.first, self.next = True, threading.Semaphore(0)

    def run(self, *args, **kwargs):
        if not self.first:
            self.next.release()
        self.first = False
        return super().run(*args, **kwargs)


def test_a_client_is_encoded_while_the_next_one_trains():
    """Each encoding waits until the next client has begun, which it never would if that one waited for the message."""
    algorithm, tasks, waits = Begins(), iter(range(CLIENTS)), []

    def before():
        if next(tasks) < CLIENTS - 1:
            waits.append(algorithm.next.acquire(timeout=WAIT))

    fit(federated(codec=Watched(before), algorithm=algorithm), True, rounds=1)
    assert waits == [True] * (CLIENTS - 1)


def test_a_client_whose_encoder_refuses_in_the_thread_is_dropped_and_named():
    calls = iter(range(CLIENTS * ROUNDS))

    def before():
        if next(calls) == 3:
            raise MessageError("no code for this one")

    module, spy, history = federated(codec=Watched(before)), Spy(), History()
    fit(module, True, callbacks=[spy], logger=history)
    assert spy.clients == {0: [0, 1, 2, 4, 5, 6, 7], 1: list(range(CLIENTS)), 2: list(range(CLIENTS))}
    assert history.rounds("round/dropped") == {0: 1.0, 1: 0.0, 2: 0.0}
    assert module.traffic.uplink == (CLIENTS * ROUNDS - 1) * len(spy.uploads[1, 0, 0].message)


def test_any_other_error_in_the_thread_ends_the_run_as_it_is():
    def before():
        raise ZeroDivisionError("in the encoder")

    with pytest.raises(ZeroDivisionError, match="in the encoder"):
        fit(federated(codec=Watched(before)), True)
    assert encoding_threads() == []


def test_an_error_in_training_ends_the_run_and_the_thread():
    class Falls(Begins):
        def run(self, *args, **kwargs):
            if not self.first:
                raise ArithmeticError("in the second client")
            return super().run(*args, **kwargs)

    with pytest.raises(ArithmeticError, match="in the second client"):
        fit(federated(algorithm=Falls()), True)
    assert encoding_threads() == []


def test_no_thread_outlives_a_run():
    encoder = fit(federated(), True)
    assert encoding_threads() == [] and encoder._thread is None


def test_a_callback_behind_the_encoder_is_given_the_message():
    lengths = []

    class Reads(FederatedCallback):
        def on_client_update(self, trainer, pl_module, round, upload):
            lengths.append(len(upload.message))

    module = federated(codec=QuantizeCodec(6))
    callbacks = [pretraining(), GradientEncoder(module.codec, True), GradientDecoder(module.codec), Reads()]
    trainer(1, callbacks=callbacks).fit(module, datamodule=federated_data())
    assert len(lengths) == CLIENTS and set(lengths) == {module.codec.encoder.format.payload_bytes + 16}


class TwicePassed(Watched):
    """The same in two passes."""

    passes = 2


def names_of(
    monkeypatch, seconds: float, cores: int, beside: bool | None = None, codec: type[Watched] = Watched, **changes: Any
) -> list[str]:
    """Return the thread of every encoding when each takes so many seconds and the machine has so many cores."""
    names: list[str] = []

    def before():
        names.append(threading.current_thread().name)
        time.sleep(seconds)

    monkeypatch.setattr("fedlight.callbacks.codec.spare_cores", lambda processes: cores - processes)
    fit(federated(codec=codec(before), **changes), beside, rounds=1)
    return [name.partition("_")[0] for name in names]


def test_slow_encoders_get_a_thread_after_a_few_clients_where_a_core_is_free(monkeypatch):
    slow, main = 2 * WORTH_A_THREAD, threading.current_thread().name
    assert names_of(monkeypatch, slow, cores=2) == [main] * TRIES + ["fedlight-encode"] * (CLIENTS - TRIES)
    assert names_of(monkeypatch, slow, cores=1) == [main] * CLIENTS
    assert names_of(monkeypatch, slow, cores=2, beside=False) == [main] * CLIENTS
    assert names_of(monkeypatch, 0.0, cores=1, beside=True) == ["fedlight-encode"] * CLIENTS


def test_none_is_started_where_nobody_would_train_beside_it(monkeypatch):
    slow, main = 2 * WORTH_A_THREAD, threading.current_thread().name
    assert names_of(monkeypatch, slow, cores=4, engine=Threaded(2)) == [main] * CLIENTS, "the other clients train already"
    first, second = [main] * TRIES + ["fedlight-encode"] * (CLIENTS - TRIES), [main] * CLIENTS
    assert names_of(monkeypatch, slow, cores=2, codec=TwicePassed) == first + second, "in the second pass nobody trains"


def test_quick_encoders_get_none(monkeypatch):
    monkeypatch.setattr("fedlight.callbacks.codec.WORTH_A_THREAD", 1e3)
    assert names_of(monkeypatch, 0.0, cores=2) == [threading.current_thread().name] * CLIENTS


def test_spare_cores_are_those_that_no_process_computes_on(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [spare_cores(processes) for processes in (1, 2, 3)] == [5, 2, 0]


def test_the_profiler_says_how_long_the_round_waits_for_the_thread():
    profiler = SimpleProfiler()
    fit(federated(codec=QuantizeCodec(6)), True, profiler=profiler)
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert counts["[Round]encode"] == counts["[Round]wait_encode"] == CLIENTS * ROUNDS


def test_a_run_goes_on_from_a_checkpoint_with_or_without_the_thread(tmp_path):
    ends = []
    for first, second in ((False, False), (True, False), (False, True)):
        path = tmp_path / f"{first}{second}.ckpt"
        module = federated(codec=TopKCodec(4))
        callbacks = [pretraining(), GradientEncoder(module.codec, first), GradientDecoder(module.codec)]
        runner = trainer(2, callbacks=callbacks)
        runner.fit(module, datamodule=federated_data())
        runner.save_checkpoint(path)
        module = federated(codec=TopKCodec(4))
        callbacks = [pretraining(), GradientEncoder(module.codec, second), GradientDecoder(module.codec)]
        trainer(4, callbacks=callbacks).fit(module, datamodule=federated_data(), ckpt_path=path, weights_only=False)
        ends.append(weights_of(module))
    assert all(torch.equal(ends[0], end) for end in ends[1:])


def test_a_client_that_answers_twice_counts_once():
    module, spy = federated(), Spy()
    fit(module, True, rounds=1, data=federated_data(sampler=Fixed([2, 5, 2])), callbacks=[spy])
    assert spy.clients[0] == [2, 5]
