from __future__ import annotations

import torch

from fedlight.codecs import IdentityCodec, PowerSGDCodec, QSGDCodec
from fedlight.core.codec import Context, Private, State
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator
from fedlight.core.simulate import simulate_round

LAYOUT = Layout(("w", "b"), ((6, 8), (6,)))


def test_the_aggregate_is_the_weighted_mean_of_what_was_sent() -> None:
    updates = torch.tensor([[1.0, 2.0], [5.0, -2.0]])
    codec = IdentityCodec().bind(Layout.vector(2))
    assert simulate_round(codec, updates).tolist() == [3.0, 0.0]
    assert simulate_round(codec, updates, [3, 1]).tolist() == [2.0, 1.0]


def test_it_is_decode_sum_of_the_messages_that_clients_would_send() -> None:
    codec, context = QSGDCodec(4).bind(LAYOUT), Context(seed=5, round=7, attempt=1)
    updates = torch.randn(3, LAYOUT.dim, generator=torch.Generator().manual_seed(0))
    messages = [
        codec.encoder.encode_message(update, context, Private(torch_generator(5, 7, 1, client, "encode", 0)))
        for client, update in enumerate(updates)
    ]
    assert torch.equal(simulate_round(codec, updates, [1, 2, 3], context), codec.decoder.decode_sum(messages, [1, 2, 3], context, {}))


def test_messages_of_every_pass_are_shown_in_order() -> None:
    seen: list[tuple[int, int]] = []
    updates = torch.ones(2, LAYOUT.dim)
    simulate_round(PowerSGDCodec(1).bind(LAYOUT), updates, on_message=lambda step, client, message: seen.append((step, client)))
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_states_are_changed_in_place_and_the_updates_are_not() -> None:
    server: State = {}
    clients: list[State] = [{}, {}]
    updates = torch.randn(2, LAYOUT.dim)
    kept = updates.clone()
    simulate_round(PowerSGDCodec(1).bind(LAYOUT), updates, server_state=server, client_states=clients)
    assert server.keys() == {"right"} and all(state.keys() == {"error"} for state in clients)
    assert torch.equal(updates, kept)
