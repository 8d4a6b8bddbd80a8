from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.codecs import TransformCodec, matrices
from fedlight.codecs.matrices import Matrices
from fedlight.codecs.probes import ProbedEncoder, add_probes, draw_signs, probe, probe_length
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context, Private, ServerContext
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator

LAYOUT = Layout(("a.weight", "a.bias", "norm"), ((24, 29), (24,), (20,)))
MATRICES = Matrices.of(LAYOUT)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_signs_are_public_unit_vectors_that_change_with_the_round() -> None:
    context = Context(seed=3, round=5)
    (across, along), *rest = draw_signs(MATRICES, 2, context, torch.device("cpu"))
    assert not rest, "the vector has no probe"
    assert across.shape == (2, 24) and along.shape == (30, 2)
    assert probe_length(MATRICES, 2) == 2 * (24 + 30)
    torch.testing.assert_close(across.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(along.norm(dim=0), torch.ones(2))
    again = draw_signs(MATRICES, 2, context, torch.device("cpu"))[0]
    assert torch.equal(again[0], across) and torch.equal(again[1], along)
    for other in (replace(context, round=6), replace(context, seed=4), replace(context, attempt=1)):
        assert not torch.equal(draw_signs(MATRICES, 2, other, torch.device("cpu"))[0][0], across)


@given(st.integers(0, 1000))
def test_probes_are_linear(seed: int) -> None:
    left_out = drawn(3, 24, 30, seed=seed)
    signs = draw_signs(MATRICES, 2, Context(seed=seed), torch.device("cpu"))[0]
    for whole, parts in zip(probe(left_out.sum(0), signs), probe(left_out, signs), strict=True):
        torch.testing.assert_close(whole, parts.sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("longest", [1024, 20], ids=["two sides", "three sides"])
def test_a_message_carries_probes_of_what_its_coefficients_leave_out(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "LONGEST_SIDE", longest)
    layout = Layout(("conv", "a.weight", "norm"), ((6, 2, 1, 1), (24, 30), (20,)))
    bank = UpdateBank(drawn(6, 4, layout.dim), layout)
    codec = TransformCodec(4, cohort=4, encoder_share=10.0, probes=2)
    codec.fit(bank, lambda *_: {})
    encoder = codec.encoder.stage(0)
    assert isinstance(encoder, ProbedEncoder)
    context, update = Context(seed=1), bank.updates[0, 0]
    code = encoder.encode(update, context, Private(torch_generator("test")))
    left_out = update - encoder.matrices.join(encoder.expand(code[: len(encoder.order)]))
    views = [view for view, item in zip(encoder.matrices.view(left_out), encoder.matrices.items, strict=True) if not item.plain]
    expected = [
        each.flatten() / unit
        for view, signs, unit in zip(views, draw_signs(encoder.matrices, 2, context, update.device), encoder.unit, strict=True)
        for each in probe(view, signs)
    ]
    torch.testing.assert_close(code[len(encoder.order) :], torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_probes_of_many_rounds_have_the_gram_matrices_of_what_is_left_out() -> None:
    """With the energy that it has, on both sides: the mean over signs is exact, of 4,000 rounds nearly."""
    left_out = drawn(24, 3) @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ drawn(3, 30, seed=1)
    right, left = torch.zeros(30, 30), torch.zeros(24, 24)
    rounds = 4000
    for round in range(rounds):
        seen = add_probes(torch.zeros(24, 30), *probe(left_out, draw_signs(MATRICES, 1, Context(round=round), torch.device("cpu"))[0]))
        right += seen.T @ seen / rounds
        left += seen @ seen.T / rounds
    true = left_out.T @ left_out
    assert float((right - true).norm() / true.norm()) < 0.08
    # The left side's directions come from `along`; their energy from `across`: the same on average, but not direction by direction.
    directions = torch.linalg.eigh(left_out @ left_out.T).eigenvectors[:, -3:]
    assert float((directions.T @ left @ directions).trace() / left.trace()) > 0.99
    assert abs(float(left.trace() / true.trace()) - 1) < 0.08


def updates(rounds: int, directions: torch.Tensor, seed: int) -> torch.Tensor:
    """Clients' updates ``[rounds, 4, dim]`` of a matrix whose rows lie in some directions ``[k, 30]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rounds, 4, 24, len(directions), generator=generator) @ directions
    rows = rows + 3 * torch.randn(rounds, 1, 24, len(directions), generator=generator) @ directions
    views = [[[rows[r, c], torch.zeros(1, 20)] for c in range(4)] for r in range(rounds)]
    return torch.stack([torch.stack([MATRICES.join(view) for view in clients]) for clients in views])


def observed(codec: TransformCodec, true: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return what a server sees ``[rounds, dim]`` of rounds of updates, and the relative error of the aggregates."""
    state: dict = {}
    seen, error = [], 0.0
    for number, clients in enumerate(true):
        context = Context(round=number, broadcast=codec.decoder.broadcast(state))
        private = Private(torch_generator("test", number))
        mean = codec.encoder.encode(clients, context, private).float().mean(0)
        aggregate = codec.decoder.decode(mean, ServerContext.of(context, len(clients)), state)
        seen.append(codec.decoder.observe(mean, context, aggregate))
        error += float((aggregate - clients.mean(0)).norm() / clients.mean(0).norm()) / len(true)
    return torch.stack(seen), error


@pytest.mark.parametrize(("probes", "learns"), [(0, False), (1, True), (2, True)])
def test_a_codec_learns_from_sums_alone_what_it_could_not_send(probes: int, learns: bool) -> None:
    """Updates turn to directions that the bank had not; fitting to what the server sees of them brings those in, with probes."""
    old, new = drawn(3, 30), drawn(3, 30, seed=9)
    new = new - new @ torch.linalg.pinv(old) @ old  # nothing of it is in the old directions
    codec = TransformCodec(3, cohort=4, encoder_share=10.0, probes=probes)
    codec.fit(UpdateBank(updates(8, old, 0), LAYOUT), lambda *_: {})
    turned = updates(12, torch.cat([old, new]), 1)
    seen, error = observed(codec, turned)
    assert error > 0.5
    recorded = updates(12, old, 3)  # what a server can record itself: how much clients differ
    for step in range(3):
        codec.fit(UpdateBank(seen[:, None] + recorded - recorded.mean(1, keepdim=True), LAYOUT), lambda *_: {})
        seen, error = observed(codec, updates(12, torch.cat([old, new]), 4 + step))
    assert (error < 0.35) == learns, error


def test_probes_belong_to_the_budget() -> None:
    bank = UpdateBank(updates(6, drawn(30, 30), 0), LAYOUT)
    sizes = {}
    for probes in (0, 1):
        codec = TransformCodec(6, cohort=4, encoder_share=10.0, probes=probes)
        codec.fit(bank, lambda *_: {})
        sizes[probes] = codec.encoder.format.payload_bytes, codec.encoder.code_dim
    most = 4 * LAYOUT.dim / 6
    assert all(0.9 * most - 30 < size + 16 <= most for size, _ in sizes.values()), sizes
    with pytest.raises(ConfigurationError, match="fewer `probes`"):
        TransformCodec(70, probes=1).fit(bank, lambda *_: {})
    with pytest.raises(ConfigurationError, match="`probes` >= 0"):
        TransformCodec(4, probes=-1)
