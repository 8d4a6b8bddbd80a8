"""The laws that every aggregator of the family keeps."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlight.aggregation import AggregationSetting, Aggregator, DropOuts, PlainAggregator, SecureAggregator
from fedlight.codecs import QuantizeCodec
from fedlight.core.codec import Context, Private
from fedlight.core.layout import Layout
from fedlight.core.rounds import Round, Upload

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


def upload_of(codec, client: int, weight: int, seed: int = 0) -> tuple[Upload, torch.Tensor]:
    """Return a client's upload and the code that is in it."""
    context, private = Context(), Private(torch.Generator().manual_seed(1000 * seed + client))
    update = 4 * torch.randn(codec.encoder.dim, generator=torch.Generator().manual_seed(seed + client))
    message = codec.encoder.encode_message(update, context, private)
    code = codec.decoder.read_message(message, context)
    return Upload(client, update, torch.empty(0), weight, 0.0, weight > 1, message), code


def attempt(aggregator: Aggregator, codec, uploads: Sequence[Upload]) -> Round:
    cohort = np.arange(CLIENTS, dtype=np.int64)
    round = Round(Context(), cohort, cohort)
    aggregator.check(AggregationSetting(codec, CLIENTS, max(upload.weight for upload in uploads), False, 1))
    aggregator.open(round, codec, torch.zeros(3))
    for upload in uploads:
        aggregator.leave(round, upload)
        aggregator.arrive(round, upload.outside() if aggregator.hides_messages else upload, codec.decoder, CPU)
    aggregator.close(round, CPU)
    return round


@rows
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_the_sum_is_that_of_the_codes_that_arrived_in_any_order(make, largest, data, seed):
    codec = codec_of()
    clients = data.draw(st.permutations(range(CLIENTS)))[: data.draw(st.integers(5, CLIENTS))]
    weights = [data.draw(st.integers(1, largest)) for _ in clients]
    pairs = [upload_of(codec, client, weight, seed) for client, weight in zip(clients, weights, strict=True)]
    aggregator = make()
    codes = attempt(aggregator, codec, [upload for upload, _ in pairs]).codes
    assert codes.total.dtype == torch.int64
    assert codes.total.tolist() == sum(weight * code.long() for weight, (_, code) in zip(weights, pairs, strict=True)).tolist()
    assert codes.count == len(clients) and codes.weight == sum(weights)
    assert codes.effective_count == len(clients) or (largest > 1 and not aggregator.hides_messages)


@rows
def test_one_aggregator_serves_attempt_after_attempt(make, largest):
    codec, aggregator = codec_of(), make()
    for seed in range(2):
        pairs = [upload_of(codec, client, 1, seed) for client in range(CLIENTS)]
        assert torch.equal(attempt(aggregator, codec, [u for u, _ in pairs]).codes.total, sum(code.long() for _, code in pairs))


@rows
def test_it_describes_itself_without_anything_that_changes(make, largest):
    aggregator = make()
    before = aggregator.describe()
    codec = codec_of()
    attempt(aggregator, codec, [upload_of(codec, client, 1)[0] for client in range(CLIENTS)])
    assert aggregator.describe() == before == make().describe()
    assert before.startswith(type(aggregator).__name__)


def test_descriptions_tell_settings_apart():
    made = [SecureAggregator(10), SecureAggregator(11), SecureAggregator(10, 8), SecureAggregator(10, drop_outs=DropOuts(1))]
    assert len({aggregator.describe() for aggregator in [*made, PlainAggregator()]}) == 5


@rows
def test_what_is_held_does_not_grow_with_what_arrives(make, largest):
    """The server's side: one sum, and nothing as long as a code for each client."""
    dim = 100_000
    codec, aggregator = codec_of(dim), make()
    uploads = [upload_of(codec, client, 1)[0] for client in range(CLIENTS)]
    cohort = np.arange(CLIENTS, dtype=np.int64)
    round = Round(Context(), cohort, cohort)
    aggregator.open(round, codec, torch.zeros(3))
    for upload in uploads:
        aggregator.leave(round, upload)
    held = []
    tracemalloc.start()
    for upload in uploads:
        aggregator.arrive(round, upload, codec.decoder, CPU)
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[-1] - held[1] < dim / 2  # a code takes that many bytes on the wire, and eight times as much in memory
    aggregator.close(round, CPU)
