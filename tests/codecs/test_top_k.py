from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlight.codecs import ChainCodec, LinearCodec, TopKCodec
from fedlight.core.codec import Context, Private, State
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER, write_message

DIM = 200


def rounds(codec: TopKCodec, updates: torch.Tensor, state: State) -> list[torch.Tensor]:
    """What one client sends in consecutive rounds, decoded."""
    return [simulate_round(codec, u[None], context=Context(round=i), client_states=[state]) for i, u in enumerate(updates)]


@pytest.mark.parametrize("ratio", [2, 8, 20])
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_what_was_sent_and_what_is_kept_are_what_there_was(ratio: float, values: str) -> None:
    """residual + sent == residual before + update, to the bit with float32 values."""
    codec = TopKCodec(ratio, values=values).bind(Layout.vector(DIM))
    state: State = {}
    for number in range(6):
        update = torch.randn(DIM, generator=torch.Generator().manual_seed(number))
        before = state.get("residual", torch.zeros(DIM)).clone()
        sent = simulate_round(codec, update[None], context=Context(round=number), client_states=[state])
        if values == "float32":
            assert torch.equal(state["residual"] + sent, before + update)
        torch.testing.assert_close(state["residual"] + sent, before + update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("feedback", [True, False])
def test_the_largest_entries_are_sent(feedback: bool) -> None:
    codec = TopKCodec(8, feedback).bind(Layout.vector(DIM))
    update = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
    sent = rounds(codec, update[None], {})[0]
    (k, _) = (part.length for part in codec.encoder.format.parts)
    assert int(sent.count_nonzero()) == k
    assert torch.equal(sent[sent != 0], update[sent != 0]) and update[sent != 0].abs().min() >= update[sent == 0].abs().max()


def test_feedback_sends_everything_in_the_end_and_nothing_does_without() -> None:
    update = torch.linspace(0.1, 1, DIM).expand(100, DIM)
    with_feedback = torch.stack(rounds(TopKCodec(8).bind(Layout.vector(DIM)), update, {})).mean(0)
    without = torch.stack(rounds(TopKCodec(8, feedback=False).bind(Layout.vector(DIM)), update, {})).mean(0)
    assert (with_feedback - update[0]).norm() < 0.1 * update[0].norm() and with_feedback.min() > 0
    assert int((without == 0).sum()) > 0.8 * DIM


def test_without_feedback_nothing_is_kept() -> None:
    state: State = {}
    rounds(TopKCodec(8, feedback=False).bind(Layout.vector(DIM)), torch.randn(2, DIM), state)
    assert not state


@given(dim=st.integers(2, 70_000), ratio=st.floats(1, 200), values=st.sampled_from(["float32", "float16"]))
def test_the_budget_is_met_exactly_from_below(dim: int, ratio: float, values: str) -> None:
    """Values and indices together: one entry more would be over."""
    budget, width = int(4 * dim / ratio), {"float32": 32, "float16": 16}[values]
    bits = max(2, math.ceil(math.log2(dim + 1)))
    needed = [k * width // 8 + math.ceil(k * bits / 8) for k in range(min(dim, budget * 8 // width) + 2)]
    most = max(k for k, size in enumerate(needed) if size <= budget and k <= dim)
    assume(most)
    codec = TopKCodec(ratio, values=values).bind(Layout.vector(dim))
    k, indices = codec.encoder.format.parts
    assert (k.length, indices.length, indices.bits) == (most, most, bits)
    message = codec.encoder.encode_message(torch.ones(dim), Context(), Private(torch.Generator()))
    assert len(message) == HEADER.size + needed[most] <= HEADER.size + budget


def test_a_budget_below_one_entry_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="an entry of 5 bytes but `ratio` 20 leaves 4 .* choose a smaller `ratio`"):
        TopKCodec(20).bind(Layout.vector(20))


@pytest.mark.parametrize("dim", [2, 3, 4, 15, 16, 17, 255, 256, 257])
def test_every_index_can_be_sent(dim: int) -> None:
    codec = TopKCodec(1).bind(Layout.vector(dim))
    for place in range(dim):
        update = torch.zeros(1, dim)
        update[0, place] = -2.5
        assert torch.equal(simulate_round(codec, update), update[0])


@pytest.mark.parametrize("places", [[200, 3], [3, 3], [7, 3], [0, 255]])
def test_indices_that_are_no_places_are_refused(places: list[int]) -> None:
    codec = TopKCodec(69).bind(Layout.vector(DIM))  # 11 bytes: two entries
    values, indices = codec.encoder.format.parts
    assert (values.length, indices.bits) == (2, 8)
    payload = bytes(values.pack(torch.ones(2))) + bytes(places)
    message = write_message(payload, codec.encoder.format.kind, 4, 0, codec.encoder.fingerprint)
    with pytest.raises(MessageError, match=r"ascending indices below 200|within \+-127"):
        codec.decoder.read_message(message, Context())


def test_a_residual_that_would_overflow_stays_finite() -> None:
    state: State = {}
    sent = rounds(TopKCodec(8).bind(Layout.vector(DIM)), torch.full((4, DIM), 3e38), state)
    assert all(torch.isfinite(one).all() for one in sent) and torch.isfinite(state["residual"]).all()


def test_behind_another_codec_it_keeps_what_is_left_of_the_code() -> None:
    codec = ChainCodec([LinearCodec(2, "random", "flat", 20), TopKCodec(4)]).bind(Layout.vector(DIM))
    state: State = {}
    simulate_round(codec, torch.randn(1, DIM), client_states=[state])
    assert state["1"]["residual"].shape == (DIM // 2,) and codec.client_state and not codec.additive
