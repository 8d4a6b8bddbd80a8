"""The laws that every aggregator of the family keeps, on its two halves alone: messages go from the one to the other stage by stage."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlight.aggregation import AggregationSetting, Aggregator, PlainAggregator, SecureAggregator
from fedlight.aggregation.base import TRAIN, Collector, Held, Sealer
from fedlight.aggregation.secure_aggregator import CONSISTENCY_CHECK
from fedlight.codecs import QuantizeCodec
from fedlight.core.codec import Codec, Context, Private
from fedlight.core.errors import MessageError, ProtocolError
from fedlight.core.layout import Layout
from fedlight.core.model import Model
from fedlight.core.running_sum import RunningSum

CLIENTS, DIM, LARGEST = 6, 9, 5
ROWS: dict[str, tuple[Callable[[], Aggregator], int]] = {
    "plain": (PlainAggregator, 1),
    "plain, weights": (PlainAggregator, LARGEST),
    "secure": (lambda: SecureAggregator(CLIENTS), 1),
    "secure, weights": (lambda: SecureAggregator(CLIENTS, max_weight=LARGEST), LARGEST),
}

rows = pytest.mark.parametrize(("make", "largest"), ROWS.values(), ids=ROWS)
CPU = torch.device("cpu")


def codec_of(dim: int = DIM, bits: int = 4) -> QuantizeCodec:
    return QuantizeCodec(bits).bind(Layout.vector(dim))


@dataclass
class Sender:
    """A client with a code to send."""

    client: int
    code: torch.Tensor
    weight: int


def sender(codec: Codec, client: int, weight: int, seed: int = 0) -> Sender:
    private = Private(torch.Generator().manual_seed(1000 * seed + client))
    update = 4 * torch.randn(codec.encoder.dim, generator=torch.Generator().manual_seed(seed + client))
    return Sender(client, codec.encoder.encode(update, Context(), private), weight)


class Attempt:
    """One attempt: what the server's half asks, the clients' half answers."""

    def __init__(self, aggregator: Aggregator, codec: Codec, senders: Sequence[Sender]) -> None:
        self.held = Held(Context(), codec.encoder, Model(torch.zeros(3), torch.empty(0)))
        self.senders = {sender.client: sender for sender in senders}
        self.sealer: Sealer = aggregator.sealer()
        self.collector: Collector = aggregator.collector(self.held.context, codec, range(CLIENTS), self.held.model, CPU)
        self.asked: dict[str, list[int]] = {}

    def answers(self, stage: str) -> dict[int, bytes]:
        """Begin a stage and return what the clients answer, in the order of the senders."""
        payloads = self.collector.requests(stage)
        self.asked[stage] = sorted(self.senders if payloads is None else payloads)
        found = {}
        for client, sender in self.senders.items():
            payload = b"" if payloads is None else payloads[client]
            if stage == TRAIN:
                found[client] = self.sealer.seal(client, sender.code, sender.weight, payload, self.held)
            else:
                found[client] = self.sealer.answer(stage, client, payload, self.held)
        return found

    def stage(self, stage: str) -> None:
        for client, message in self.answers(stage).items():
            self.collector.receive(stage, client, message, self.senders[client].weight)


def attempt(aggregator: Aggregator, codec: Codec, senders: Sequence[Sender]) -> RunningSum:
    """Return the sum of one attempt."""
    aggregator.check(AggregationSetting(codec, CLIENTS, max(sender.weight for sender in senders), False, 1))
    running = Attempt(aggregator, codec, senders)
    for stage in aggregator.stages:
        running.stage(stage)
    return running.collector.finish()


@rows
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_the_sum_is_that_of_the_codes_that_arrived_in_any_order(make, largest, data, seed):
    codec = codec_of()
    clients = data.draw(st.permutations(range(CLIENTS)))[: data.draw(st.integers(5, CLIENTS))]
    senders = [sender(codec, client, data.draw(st.integers(1, largest)), seed) for client in clients]
    aggregator = make()
    codes = attempt(aggregator, codec, senders)
    assert codes.total.dtype == torch.int64
    assert codes.total.tolist() == sum(sender.weight * sender.code.long() for sender in senders).tolist()
    assert codes.count == len(clients) and codes.weight == sum(sender.weight for sender in senders)
    assert codes.effective_count == len(clients) or (largest > 1 and not aggregator.hides_messages)


@rows
def test_one_aggregator_serves_attempt_after_attempt(make, largest):
    codec, aggregator = codec_of(), make()
    for seed in range(2):
        senders = [sender(codec, client, 1, seed) for client in range(CLIENTS)]
        assert torch.equal(attempt(aggregator, codec, senders).total, sum(sender.code.long() for sender in senders))


@rows
def test_it_describes_itself_without_anything_that_changes(make, largest):
    aggregator = make()
    before = aggregator.describe()
    codec = codec_of()
    attempt(aggregator, codec, [sender(codec, client, 1) for client in range(CLIENTS)])
    assert aggregator.describe() == before == make().describe()
    assert before.startswith(type(aggregator).__name__)


def test_descriptions_tell_settings_apart():
    made = [SecureAggregator(10), SecureAggregator(11), SecureAggregator(10, 8), SecureAggregator(10, max_weight=2)]
    assert len({aggregator.describe() for aggregator in [*made, PlainAggregator()]}) == 5


@rows
def test_what_is_held_does_not_grow_with_what_arrives(make, largest):
    """The server's side: one sum, and nothing as long as a code for each client."""
    dim = 100_000
    codec, aggregator = codec_of(dim), make()
    running = Attempt(aggregator, codec, [sender(codec, client, 1) for client in range(CLIENTS)])
    at = aggregator.stages.index(TRAIN)
    for stage in aggregator.stages[:at]:
        running.stage(stage)
    held, messages = [], running.answers(TRAIN)
    tracemalloc.start()
    for client, message in messages.items():
        running.collector.receive(TRAIN, client, message, 1)
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[-1] - held[1] < dim / 2  # a code takes that many bytes on the wire, and eight times as much in memory


@rows
def test_a_message_shows_its_code_unless_codes_are_hidden(make, largest):
    codec, aggregator = codec_of(), make()
    senders = [sender(codec, client, 1) for client in range(CLIENTS)]
    running = Attempt(aggregator, codec, senders)
    for stage in aggregator.stages[: aggregator.stages.index(TRAIN)]:
        running.stage(stage)
    messages = running.answers(TRAIN)
    for one in senders:
        try:
            shown = torch.equal(codec.decoder.read_message(messages[one.client], running.held.context), one.code)
        except MessageError:
            shown = False
        assert shown != aggregator.hides_messages


@rows
def test_a_client_answers_no_stage_that_is_not_the_aggregations(make, largest):
    codec = codec_of()
    running = Attempt(make(), codec, [sender(codec, 0, 1)])
    for stage in ("another", CONSISTENCY_CHECK):  # of a session that the client has not begun
        with pytest.raises(ProtocolError, match=f"but was asked for '{stage}'"):
            running.sealer.answer(stage, 0, b"", running.held)


def test_everybody_is_asked_in_every_stage_and_trains_once():
    codec, aggregator = codec_of(), SecureAggregator(CLIENTS)
    running = Attempt(aggregator, codec, [sender(codec, client, 1) for client in range(CLIENTS)])
    for stage in aggregator.stages:
        running.stage(stage)
    assert running.asked == {stage: list(range(CLIENTS)) for stage in aggregator.stages} and aggregator.stages.count(TRAIN) == 1
