"""Laws of a round with simulated clients and no Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlight.aggregation import TRAIN, PlainAggregator, Sealer
from fedlight.aggregation.base import PlainCollector
from fedlight.clients import FedAvg
from fedlight.codecs import ChainCodec, IdentityCodec, LinearCodec, PowerSGDCodec, QuantizeCodec, TransformCodec
from fedlight.core.errors import MessageError, RoundFailedError
from fedlight.privacy import CentralDP
from fedlight.rounds import CatchUp, Clients, CodedModel, DropOut, FullModel
from fedlight.rounds.host import AT_FIRST
from fedlight.rounds.messages import LACKS, Reply
from tests.rounds.federation import CLIENTS, Federation, federation


def everybody(number: int, attempt: int) -> list[int]:
    return list(range(CLIENTS))


def test_the_global_model_moves_by_the_mean_update() -> None:
    run = federation(cohort=everybody)
    before = run.weights
    call = run.run(1).calls[0]
    assert call.aggregate is not None and call.observed.true is not None
    torch.testing.assert_close(call.aggregate, call.observed.true.mean())
    torch.testing.assert_close(run.weights, before - call.aggregate)
    assert call.codes.count == CLIENTS == len(call.answered) and run.server.state.rounds == 1


def test_an_empty_cohort_is_a_release_under_central_privacy() -> None:
    """Whether anybody came must not show: the noise is added, decoded and entered in the ledger."""
    run = federation(privacy=CentralDP(0.5, 1.0, delta=1e-4, simulation_seed=0), cohort=lambda number, attempt: [])
    before = run.weights
    call = run.run(1).calls[0]
    assert run.server.privacy is not None and len(run.server.privacy.ledger) == 1
    assert call.codes.count == 0 and not torch.equal(run.weights, before)


def test_without_privacy_an_empty_cohort_is_a_failed_attempt() -> None:
    with pytest.raises(RoundFailedError, match="in 3 attempts .the cohorts were too small."):
        federation(cohort=lambda number, attempt: []).run(1)


@pytest.mark.parametrize("downlink", [CatchUp, CodedModel])
@pytest.mark.parametrize("norm", [False, True])
def test_a_client_that_catches_up_ends_with_the_servers_model(norm: bool, downlink: type[CatchUp]) -> None:
    """Through bytes: client 5 is away for six rounds, and then takes the server's steps itself."""

    def cohort(number: int, attempt: int) -> list[int]:
        return [0, 1, 2, 3, 5] if number in (0, 7) else [0, 1, 2, 3, 4]

    codec = TransformCodec(3, encoder_share=2.0)
    run = federation(codec, downlink=downlink(), through_bytes=True, norm=norm, cohort=cohort).run(7)
    at_server = run.server.model.read()
    run.run(1)
    held = run.host.held._models[5]
    assert held.round == 7 and run.calls[7].answered == {0, 1, 2, 3, 5}
    model = run.host.held.model(held)
    assert torch.equal(model.weights, at_server.weights) and torch.equal(model.buffers, at_server.buffers)


def test_a_newcomer_begins_with_the_seed() -> None:
    """Nobody downloads the initial model, which is drawn from the seed: the first download is a few bytes and the encoder."""
    run = federation(QuantizeCodec(4), downlink=CatchUp(), cohort=everybody, through_bytes=True).run(1)
    traffic = run.server.state.traffic
    assert traffic.downlink - traffic.codec < 80 * CLIENTS < 4 * len(run.weights) * CLIENTS


class Asked(Clients):
    """Remembers who was asked for what."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.asked: list[tuple[int, str, list[int]]] = []

    def exchange(self, requests):
        if requests:
            self.asked.append((requests[0].context.step, requests[0].stage, [request.client for request in requests]))
        yield from self.clients.exchange(requests)

    def settle(self, key, counted):
        self.clients.settle(key, counted)


def test_a_second_pass_asks_those_who_answered_the_first() -> None:
    """Nobody else is sent the first pass's result, nor charged for it."""
    run = federation(PowerSGDCodec(1), availability=DropOut(0.5), cohort=everybody, wrap=Asked).run(1)
    asked = run.clients
    assert isinstance(asked, Asked)
    (_, _, first), (step, _, second) = asked.asked
    assert step == 1 and second == sorted(run.calls[0].answered) and 0 < len(second) < len(first) == CLIENTS
    assert run.calls[0].absent == CLIENTS - len(second)


def test_weights_of_the_first_pass_hold_in_the_second() -> None:
    """They are sent once: PowerSGD of full rank decodes the weighted mean."""
    whole = federation(IdentityCodec(), by_samples=True, cohort=everybody).run(1)
    low_rank = federation(PowerSGDCodec(8, feedback=False), by_samples=True, cohort=everybody).run(1)
    torch.testing.assert_close(whole.weights, low_rank.weights, atol=1e-5, rtol=1e-4)


class Hostile(Clients):
    """Adds replies that nobody asked for, and spoils one."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients

    def exchange(self, requests):
        yield Reply(99, requests[0].stage, b"nobody asked")
        yield Reply(3, "unmasking", b"another stage")
        for reply in self.clients.exchange(requests):
            if reply.client == 2:
                reply.payload = bytes(reply.payload)[:-1]
            yield reply
            if reply.client == 4:
                yield reply

    def settle(self, key, counted):
        self.clients.settle(key, counted)


def test_what_cannot_be_used_is_dropped_and_named_and_the_round_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def codec() -> ChainCodec:
        return ChainCodec([LinearCodec(2, "random", block_size=16), QuantizeCodec(6)])

    hostile = federation(codec(), cohort=everybody, wrap=Hostile).run(1)
    without = federation(codec(), cohort=lambda number, attempt: [0, 1, 3, 4, 5, 6, 7]).run(1)
    call = hostile.calls[0]
    assert call.answered == {0, 1, 3, 4, 5, 6, 7} and torch.equal(hostile.weights, without.weights)
    reasons = dict(call.dropped)
    assert reasons.keys() == {2, 3, 4, 99}
    assert "payload of" in reasons[2] and reasons[4] == "it has answered already"
    assert reasons[99] == reasons[3] == "it was not asked for this"
    assert all(f"client {client} was dropped" in caplog.text for client in reasons)


class Late(Clients):
    """Delivers, in an attempt, what a client sent in the one before, in front of its own."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.before: list[Reply] = []

    def exchange(self, requests):
        now = list(self.clients.exchange(requests))
        yield from [*self.before, *now]
        self.before = [reply for reply in now if reply.client == 3]

    def settle(self, key, counted):
        self.clients.settle(key, counted)


@pytest.mark.parametrize("through_bytes", [False, True])
def test_a_late_reply_to_an_earlier_attempt_is_not_taken_for_one_to_this(through_bytes: bool) -> None:
    run = federation(cohort=everybody, wrap=Late).run(2) if not through_bytes else late_through_bytes()
    assert run.calls[1].dropped == [(3, "its reply is to an earlier attempt")]
    assert torch.equal(run.weights, federation(cohort=everybody, through_bytes=through_bytes).run(2).weights)


def late_through_bytes() -> Federation:
    run = federation(cohort=everybody, through_bytes=True)
    run.clients = Late(run.clients)
    return run.run(2)


class Failing(FedAvg):
    """Raises in the third client's training."""

    def run(self, model: Any, x: Tensor, y: Tensor, *rest: Any, **more: Any) -> Any:
        if len(y) == 22:
            raise RuntimeError("out of memory")
        return super().run(model, x, y, *rest, **more)


def test_an_error_ends_the_round_at_once_and_gives_the_generator_back() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        federation(algorithm=Failing(lr=0.1, steps=1), cohort=everybody).run(1)
    assert torch.equal(torch.get_rng_state(), state) and caught.traceback  # which still holds every frame


def test_an_error_on_the_servers_side_ends_training_too() -> None:
    class Broken(Clients):
        def __init__(self, clients: Clients) -> None:
            self.clients = clients

        def exchange(self, requests):
            return self.clients.exchange(requests)

    run = federation(cohort=everybody, wrap=Broken)
    state = torch.get_rng_state()

    def broken(call: Any, reply: Reply) -> None:
        raise RuntimeError("a callback is broken")

    run.server.watch.on_client_message = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a callback is broken") as caught:
        run.run(1)
    assert torch.equal(torch.get_rng_state(), state) and caught.traceback


def nan_loss(run: Federation, client: int) -> None:
    data = run.host.data

    def spoiled(asked: int) -> tuple[Tensor, Tensor]:
        x, y = data(asked)
        return (x * torch.nan, y) if asked == client else (x, y)

    run.host.data = spoiled


@pytest.mark.parametrize("private", [False, True])
def test_a_client_whose_training_fails(private: bool) -> None:
    """In the clear it is dropped and named; under privacy it sends zeros, counts, and nobody is told."""
    privacy = CentralDP(0.5, 1.0, delta=1e-4, simulation_seed=0) if private else None
    run = federation(privacy=privacy, cohort=everybody)
    nan_loss(run, 4)
    call = run.run(1).calls[0]
    if private:
        assert call.answered == set(everybody(0, 0)) and not call.dropped and call.dropped_count == 0
        assert call.observed.trained == CLIENTS - 1
    else:
        assert call.answered == set(everybody(0, 0)) - {4} and call.dropped == [(4, f"its loss is nan, {AT_FIRST}")]
    assert torch.isfinite(run.weights).all()


def test_states_go_on_from_where_they_were_saved() -> None:
    """Server, downlink and clients: a run in two parts is the run in one."""

    def make() -> Federation:
        return federation(PowerSGDCodec(1), downlink=FullModel())

    whole, first, second = make().run(5), make().run(2), make()
    second.server.model.network.load_state_dict(first.server.model.network.state_dict())  # type: ignore[attr-defined]
    second.server.state.load_state_dict(first.server.state.state_dict())
    second.server.downlink.load_state_dict(first.server.downlink.state_dict())
    second.host.store.load_state_dict(first.host.store.state_dict())
    second.run(3)
    assert torch.equal(whole.weights, second.weights)
    assert whole.server.state.traffic == second.server.state.traffic


class Amnesiac(Clients):
    """One client says for ever that it lacks something."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients

    def exchange(self, requests):
        for reply in self.clients.exchange(requests):
            yield Reply(reply.client, reply.stage, LACKS) if reply.client == 3 else reply

    def settle(self, key, counted):
        self.clients.settle(key, counted)


def test_a_client_that_lacks_something_for_ever_is_dropped() -> None:
    call = federation(cohort=everybody, wrap=Amnesiac).run(1).calls[0]
    assert call.dropped == [(3, "it lacks what this attempt builds on")] and call.answered == set(everybody(0, 0)) - {3}


def test_a_reply_that_cannot_be_parsed_costs_its_sender_alone() -> None:
    class Short(Amnesiac):
        def exchange(self, requests):
            for reply in self.clients.exchange(requests):
                yield Reply(3, reply.stage, b"x") if reply.client == 3 else reply

    call = federation(cohort=everybody, by_samples=True, through_bytes=True, wrap=Short).run(1).calls[0]
    assert [client for client, _ in call.dropped] == [3] and "Expected a reply of more than 4 bytes" in call.dropped[0][1]


class Greeting(PlainAggregator):
    """Asks everybody for a greeting before the code; whoever does not greet is not asked to train."""

    stages = ("hello", TRAIN)

    def sealer(self) -> Sealer:
        class Polite(Sealer):
            def answer(self, stage, client, payload, held) -> bytes:
                if client == 5:
                    raise MessageError("it greets nobody")
                return b"hello"

        return Polite()

    def collector(self, context, codec, cohort, model, device):
        class Listening(PlainCollector):
            def receive(self, stage, client, message, weight):
                return None if stage == "hello" else super().receive(stage, client, message, weight)

        return Listening(context, codec.decoder, device)


def test_a_stage_asks_those_who_passed_the_one_before() -> None:
    call = federation(aggregator=Greeting(), cohort=everybody).run(1).calls[0]
    assert call.answered == set(everybody(0, 0)) - {5} and call.dropped == [(5, "it greets nobody")]
