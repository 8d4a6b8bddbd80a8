"""What becomes of a round when a client misbehaves: every fault with the outcome that is expected of it, on the real message path.

Faults that need secure aggregation's stages are in ``tests/aggregation``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlight.aggregation import Median, NormBound, TrimmedMean
from fedlight.callbacks import FederatedCallback
from fedlight.codecs import TransformCodec, TwoSidedCodec
from fedlight.core.errors import CodecMismatchError, ConfigurationError, DataError, MessageError, RoundFailedError
from fedlight.core.layout import Layout
from fedlight.core.wire import HEADER
from fedlight.data import Everyone, Explicit
from fedlight.rounds import Clients
from tests.federation import Fixed, History, Spy, federated, federated_data, mlp, pretraining, trainer, weights_of

BAD, COHORT = 3, [0, 1, 2, 3, 4]
Forge = Callable[[bytes, list[bytes]], bytes]
Outcome = Literal["ignored", "repeated", "accepted"]


class Fault(FederatedCallback):
    """Changes what client 3 does: its update before it is encoded, or the bytes that arrive from it."""

    def __init__(
        self, update: Callable[[Tensor], Tensor] | None = None, message: Callable[[bytes, list[bytes]], bytes] | None = None
    ) -> None:
        self.update, self.message = update, message
        self.earlier: list[bytes] = []

    def on_client_update(self, trainer, pl_module, context, update):
        if update.client == BAD and self.update and context.attempt == 0:
            update.update.copy_(self.update(update.update))

    def on_client_message(self, trainer, pl_module, round, reply):
        if reply.client == BAD and self.message and round.context.attempt == 0:
            honest = reply.payload
            reply.payload = self.message(honest, self.earlier or [honest])
            self.earlier.append(honest)


class Trained(FederatedCallback):
    """Changes what local training returns for client 3, once the codec is fitted."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_start(self, trainer, pl_module):
        host = pl_module._connection.host
        made = host._update

        def tampered(task, result, model):
            update = made(task, result, model)
            if task.client == BAD:
                update.update.fill_(self.value)
            return update

        host._update = tampered


def header(**changes: int) -> Forge:
    """Return a message with other fields in its header: magic, version, kind, round, codec fingerprint, length."""
    places = {"version": 1, "kind": 2, "round": 3, "codec": 4, "length": 5}

    def forge(message: bytes, _: list[bytes]) -> bytes:
        values = list(HEADER.unpack_from(message))
        for name, change in changes.items():
            values[places[name]] += change
        return HEADER.pack(*values) + message[HEADER.size :]

    return forge


def poisoned(value: float) -> Forge:
    """Return a message of whose floats one is ``value``, as a client could send that does not check."""

    def forge(message: bytes, _: list[bytes]) -> bytes:
        codes = np.frombuffer(message, dtype="<f4", offset=HEADER.size).copy()
        codes[0] = value
        return message[: HEADER.size] + codes.tobytes()

    return forge


def crash(message: bytes, _: list[bytes]) -> bytes:
    raise MessageError("the connection was lost")


@dataclass(frozen=True)
class Row:
    make: Callable[[], FederatedCallback]
    outcome: Outcome
    reason: str = ""


FAULTS: dict[str, Row] = {
    "training ends in NaN": Row(lambda: Trained(math.nan), "ignored", "its update is not finite"),
    "training ends in Inf": Row(lambda: Trained(math.inf), "ignored", "its update is not finite"),
    "training ends in 1e38": Row(lambda: Trained(1e38), "ignored", "its update is not finite"),
    "NaN on the wire": Row(lambda: Fault(message=poisoned(math.nan)), "ignored", "finite numbers"),
    "Inf on the wire": Row(lambda: Fault(message=poisoned(math.inf)), "ignored", "finite numbers"),
    "one 1e38 on the wire": Row(lambda: Fault(message=poisoned(1e38)), "repeated"),
    "a message cut short": Row(lambda: Fault(message=lambda m, _: m[:-4]), "ignored", "payload of"),
    "a message too long": Row(lambda: Fault(message=lambda m, _: m + bytes(4)), "ignored", "payload of"),
    "another length in the header": Row(lambda: Fault(message=header(length=1)), "ignored", "code length"),
    "another type of numbers": Row(lambda: Fault(message=header(kind=1)), "ignored", "format"),
    "integers for floats": Row(lambda: Fault(message=header(kind=8 - 64)), "ignored", "format"),
    "another version of the wire": Row(lambda: Fault(message=header(version=1)), "ignored", "wire version"),
    "no message": Row(lambda: Fault(message=lambda *_: b""), "ignored", "at least 16 bytes"),
    "noise": Row(lambda: Fault(message=lambda *_: bytes(range(200))), "ignored", "magic"),
    "a stale round": Row(lambda: Fault(message=header(round=1)), "ignored", "round"),
    "another encoder": Row(lambda: Fault(message=header(codec=1)), "ignored", "codec fingerprint"),
    "a crash before the message arrives": Row(lambda: Fault(message=crash), "ignored", "connection was lost"),
    "all zeros": Row(lambda: Fault(update=torch.zeros_like), "accepted"),
    "a constant": Row(lambda: Fault(update=lambda u: torch.full_like(u, 0.01)), "accepted"),
    "the sign turned": Row(lambda: Fault(update=lambda u: -u), "accepted"),
    "ten times as long": Row(lambda: Fault(update=lambda u: 10 * u), "accepted"),
}


def fit(callbacks: list[FederatedCallback], cohort: list[int] = COHORT, rounds: int = 1, **changes: Any) -> tuple[Any, Spy, History]:
    module, spy, history = federated(**changes), Spy(), History()
    runner = trainer(rounds, logger=history, callbacks=[*callbacks, spy, pretraining()])
    runner.fit(module, datamodule=federated_data(sampler=Fixed(cohort)))
    return module, spy, history


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_has_its_outcome(name, caplog):
    row = FAULTS[name]
    module, _, history = fit([row.make()])
    without, _, _ = fit([], [client for client in COHORT if client != BAD])
    honest, _, _ = fit([])
    assert torch.isfinite(weights_of(module)).all() and module.server_state.rounds == 1
    dropped = [record.message for record in caplog.records if "was dropped" in record.message]
    if row.outcome == "ignored":
        assert torch.equal(weights_of(module), weights_of(without)), "the round is not that of the other clients"
        assert history.rounds("round/clients") == {0: 4.0} and history.rounds("round/dropped") == {0: 1.0}
        assert len(dropped) == 1 and f"client {BAD} was dropped" in dropped[0] and row.reason in dropped[0]
    elif row.outcome == "repeated":
        assert history.rounds("round/attempts") == {0: 2.0} and not dropped
        assert "the decoded aggregate was refused" in caplog.text
    else:
        assert history.rounds("round/clients") == {0: 5.0} and not dropped
        assert not torch.equal(weights_of(module), weights_of(honest)), "the fault did nothing"


def test_a_message_of_the_round_before_is_ignored():
    """A replay: well formed, but meant for another round."""
    replays = Fault(message=lambda message, earlier: earlier[0])
    _, _, history = fit([replays], rounds=2)
    assert history.rounds("round/clients") == {0: 5.0, 1: 4.0}
    assert history.rounds("round/dropped") == {0: 0.0, 1: 1.0}


class Repeats(Clients):
    """A wire on which the answer of client 3 arrives twice."""

    def attach(self, run):
        self.simulated = run.simulated()
        return self

    def exchange(self, requests):
        for reply in self.simulated.exchange(requests):
            yield reply
            if reply.client == BAD:
                yield reply

    def settle(self, key, counted):
        self.simulated.settle(key, counted)


def test_a_client_that_answers_twice_counts_once(caplog):
    module, _, history = fit([], clients=Repeats())
    honest, _, _ = fit([])
    assert torch.equal(weights_of(module), weights_of(honest))
    assert history.rounds("round/clients") == {0: 5.0} and history.rounds("round/dropped") == {0: 1.0}
    assert f"client {BAD} was dropped: it has answered already" in caplog.text


def test_a_client_invited_twice_counts_once():
    """As a sampler with replacement would have it."""
    module, _, history = fit([], [*COHORT, BAD])
    honest, _, _ = fit([])
    assert torch.equal(weights_of(module), weights_of(honest))
    assert history.rounds("round/clients") == {0: 5.0}


LOUD = {
    "the sign turned, ten times as long": Fault(update=lambda u: -10 * u),
    "ten times as long": Fault(update=lambda u: 10 * u),
    "a large constant": Fault(update=lambda u: torch.ones_like(u)),
    "one 1e38 on the wire": Fault(message=poisoned(1e38)),
}


@pytest.mark.parametrize("rule", [lambda: NormBound(0.3), lambda: TrimmedMean(0.25), Median], ids=["norm bound", "trimmed mean", "median"])
@pytest.mark.parametrize("name", LOUD)
def test_robust_rules_bound_what_a_loud_client_does(name, rule):
    """What is accepted without them moves the model far; with them no further than the honest clients might have."""
    fault = LOUD[name]
    start = weights_of(mlp())
    honest, _, _ = fit([])
    robust, _, history = fit([fault], aggregator=rule())
    assert history.rounds("round/attempts") == {0: 1.0} and history.rounds("round/clients") == {0: 5.0}
    moved, usual = (weights_of(robust) - start).norm(), (weights_of(honest) - start).norm()
    assert moved < 1.5 * usual
    if "1e38" not in name:
        plain, _, _ = fit([fault])
        assert (weights_of(plain) - weights_of(honest)).norm() > 2 * (weights_of(robust) - weights_of(honest)).norm()


@pytest.mark.parametrize("clients", [[0], [0, 1]], ids=["one", "two"])
@pytest.mark.parametrize("make", [lambda: None, lambda: TransformCodec(4, encoder_share=1.0)], ids=["floats", "integers"])
def test_cohorts_of_one_and_two_are_rounds_like_others(make, clients):
    module, _, history = fit([], clients, codec=make())
    assert module.server_state.rounds == 1 and history.rounds("round/clients") == {0: float(len(clients))}


def test_a_cohort_in_which_nobody_is_left_stops_the_run():
    start = weights_of(mlp())
    module = federated()
    runner = trainer(1, callbacks=[Always(), pretraining()])
    with pytest.raises(RoundFailedError, match="no usable aggregate of at least 1 clients in 3 attempts"):
        runner.fit(module, datamodule=federated_data(sampler=Fixed([BAD])))
    assert torch.equal(weights_of(module), start)


class Always(FederatedCallback):
    def on_client_message(self, trainer, pl_module, round, reply):
        raise MessageError("the connection was lost")


def test_a_client_without_data_is_refused_before_training():
    data = federated_data(partitioner=Explicit([list(range(50)), [], list(range(50, 90))]), num_clients=None, sampler=Everyone())
    with pytest.raises((ConfigurationError, DataError), match="client|sample"):
        trainer(1, callbacks=[pretraining()]).fit(federated(), datamodule=data)


def test_a_codec_of_another_model_is_refused_before_training():
    codec = TwoSidedCodec(2).bind(Layout.of(mlp(hidden=9)))
    module = federated(codec=codec)
    start = weights_of(module)
    with pytest.raises(CodecMismatchError):
        trainer(1, callbacks=[pretraining()]).fit(module, datamodule=federated_data())
    assert torch.equal(weights_of(module), start)
