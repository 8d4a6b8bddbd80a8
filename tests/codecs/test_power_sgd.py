from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.codecs import PowerSGDCodec
from fedlight.codecs.power_sgd import LowRank
from fedlight.core.codec import Codec, Context, State
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER

LAYOUT = Layout(("w", "b", "conv", "tiny"), ((12, 20), (12,), (6, 3, 3, 3), (2, 2)))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(codec: Codec, rounds: list[torch.Tensor], server: State, clients: list[State] | None = None) -> list[torch.Tensor]:
    publics = [Context(round=number) for number in range(len(rounds))]
    return [simulate_round(codec, u, context=p, server_state=server, client_states=clients) for u, p in zip(rounds, publics, strict=True)]


def test_the_aggregate_is_the_mean_projected_on_what_its_own_power_step_found() -> None:
    """Algorithm 1 on the mean: P = orthonormal(M Q), decoded P P^T M; everything else is exact."""
    codec = PowerSGDCodec(3, feedback=False).bind(LAYOUT)
    updates = drawn(5, LAYOUT.dim)
    decoded = LAYOUT.split(simulate_round(codec, updates, context=Context(round=2)))
    start = codec.encoder.view.rights(codec.encoder.view.start(0, 2))
    tensors = LAYOUT.split(updates.mean(0))
    for index, q in ((0, start[0]), (2, start[1])):
        mean = tensors[index].flatten(1).double()
        p = torch.linalg.qr(mean @ q.double()).Q
        torch.testing.assert_close(decoded[index].flatten(1).double(), p @ p.T @ mean, rtol=1e-4, atol=1e-5)
    for index in (1, 3):
        torch.testing.assert_close(decoded[index], tensors[index])


def test_weights_count_in_both_passes() -> None:
    codec = PowerSGDCodec(3, feedback=False).bind(LAYOUT)
    updates = drawn(2, LAYOUT.dim)
    weighted = simulate_round(codec, updates, [3, 1])
    repeated = simulate_round(codec, updates[[0, 0, 0, 1]])
    torch.testing.assert_close(weighted, repeated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_an_update_of_that_rank_comes_through_whatever_its_magnitude(scale: float) -> None:
    update = (drawn(12, 2) @ drawn(2, 20, seed=1)).flatten() * scale
    codec = PowerSGDCodec(2).bind(Layout(("w",), ((12, 20),)))
    for decoded in run(codec, [update[None]] * 3, {}):
        torch.testing.assert_close(decoded / scale, update / scale, rtol=1e-3, atol=1e-4)


def test_warm_starts_come_to_the_best_approximation_there_is() -> None:
    layout = Layout(("w",), ((12, 20),))
    matrix = drawn(12, 20)
    best = float(torch.linalg.svdvals(matrix)[2:].norm())
    errors = {}
    for warm in (True, False):
        codec = PowerSGDCodec(2, warm, feedback=False).bind(layout)
        errors[warm] = float((run(codec, [matrix.reshape(1, -1)] * 60, {})[-1] - matrix.flatten()).norm())
    assert 0.9999 * best < errors[True] < 1.01 * best < errors[False]


def test_feedback_keeps_what_the_clients_own_factors_miss() -> None:
    """Algorithm 2: e_i = M_i - P Q_i^T, and the mean of what is kept and the aggregate add up to the mean."""
    codec = PowerSGDCodec(2).bind(LAYOUT)
    updates, clients = drawn(4, LAYOUT.dim), [{} for _ in range(4)]
    server: State = {}
    for number in range(4):
        before = torch.stack([state.get("error", torch.zeros(LAYOUT.dim)) for state in clients])
        aggregate = simulate_round(codec, updates, context=Context(round=number), server_state=server, client_states=clients)
        after = torch.stack([state["error"] for state in clients])
        torch.testing.assert_close(aggregate + after.mean(0), updates.mean(0) + before.mean(0), rtol=1e-4, atol=1e-4)
        exact = torch.cat([torch.full((n,), i in (1, 3)) for i, n in enumerate(LAYOUT.sizes)])
        assert not after[:, exact].any() and after[:, ~exact].any()


def test_feedback_applies_in_time_what_one_round_leaves_out() -> None:
    update = drawn(1, LAYOUT.dim)
    errors = {}
    for feedback in (True, False):
        codec = PowerSGDCodec(1, feedback=feedback).bind(LAYOUT)
        mean = torch.stack(run(codec, [update] * 60, {}, [{}])).mean(0)
        errors[feedback] = float((mean - update[0]).norm() / update.norm())
    assert errors[True] < 0.25 < 0.5 < errors[False]


@pytest.mark.parametrize("warm", [True, False])
def test_only_what_clients_cannot_know_is_announced(warm: bool) -> None:
    codec = PowerSGDCodec(2, warm).bind(LAYOUT)
    view, state = codec.decoder.view, {}
    assert codec.decoder.broadcast(state) == {}
    run(codec, [drawn(3, LAYOUT.dim)], state)
    broadcast = codec.decoder.broadcast(state)
    assert {name: value.shape for name, value in broadcast.items()} == ({"right": (view.right_length,)} if warm else {})
    context = Context(round=1, broadcast=broadcast)
    reply = codec.decoder.decode(torch.ones(codec.encoder.code_dim), context, state)
    assert reply.shape == (view.left_length,)
    assert codec.decoder.broadcast(state) == {}, "the second pass would broadcast Q once more"


@given(rank=st.integers(1, 30), shapes=st.lists(st.lists(st.integers(1, 12), max_size=4).map(tuple), min_size=1, max_size=4))
def test_both_passes_together_send_no_more_than_the_update(rank: int, shapes: list[tuple[int, ...]]) -> None:
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(shapes))
    codec = PowerSGDCodec(rank).bind(layout)
    view = LowRank(layout, rank)
    lengths = [codec.encoder.format_at(step).length for step in (0, 1)]
    assert lengths == [view.left_length + view.rest_length, view.right_length] and sum(lengths) <= layout.dim
    sizes: list[tuple[int, int]] = []
    simulate_round(codec, torch.ones(1, layout.dim), on_message=lambda step, _, m: sizes.append((step, len(m))))
    assert sizes == [(step, HEADER.size + 4 * length) for step, length in enumerate(lengths)]


def test_a_cohort_that_did_not_move_does_not_end_the_warm_start() -> None:
    codec, state = PowerSGDCodec(2).bind(LAYOUT), {}
    still = run(codec, [torch.zeros(2, LAYOUT.dim)] * 2, state)
    assert not still[-1].any() and torch.isfinite(state["right"]).all()
    (moved,) = run(codec, [drawn(2, LAYOUT.dim)], state)
    assert moved.count_nonzero() > LAYOUT.dim / 2
