"""What an adversary sees: one client's code, sums, noise; and which codecs cannot be attacked by matching."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlight.audit.victim import Pixels, Victim
from fedlight.audit.views import CodeView, NoisyView, Observation, RoundsView, View
from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    GridCodec,
    IdentityCodec,
    LinearCodec,
    PowerSGDCodec,
    QSGDCodec,
    QuantizeCodec,
    TopKCodec,
    TransformCodec,
    TwoSidedCodec,
)
from fedlight.core.bank import UpdateBank
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator

LAYOUT = Layout(("weight", "bias"), ((24, 32), (24,)))


def bank() -> UpdateBank:
    basis = torch.randn(12, LAYOUT.dim, generator=torch_generator("basis"))
    return UpdateBank(torch.randn(12, 6, 12, generator=torch_generator("updates")) @ basis, LAYOUT)


def fitted(codec):
    codec.bind(LAYOUT)
    if codec.needs_fit:
        codec.fit(bank(), lambda *_: {})
    return codec


CODECS = {
    "identity": (IdentityCodec, True),
    "linear": (lambda: LinearCodec(4, block_size=32), True),
    "two-sided": (lambda: TwoSidedCodec(4), True),
    "autoencoder": (lambda: AutoencoderCodec(4, block_size=32, width=8, skip=False, start="random"), False),
    "integers alone": (lambda: QuantizeCodec(8), False),  # their range ends somewhere
    "two-sided in integers": (lambda: ChainCodec([TwoSidedCodec(4), QuantizeCodec(8)]), False),
    "autoencoder in integers": (
        lambda: ChainCodec([AutoencoderCodec(4, block_size=32, width=8, skip=False, start="random"), QuantizeCodec(8)]),
        False,
    ),
    "transform": (lambda: TransformCodec(8), False),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", CODECS)
def test_a_prediction_is_what_arrives_up_to_rounding_and_has_gradients(name):
    make, linear = CODECS[name]
    codec = fitted(make())
    view = CodeView(codec)
    assert view.linear is linear
    updates = bank().recorded[0, :5].double()
    predicted = view.predict(updates)
    seen = torch.stack([view.observe(updates, torch_generator("rounding", i)) for i in range(200)]).mean(0)
    tolerance = 0.03 if codec.integer else 1e-6  # the mean of 200 roundings; none for floats
    assert (predicted - seen).norm() < tolerance * seen.norm()
    one = updates[:1].clone().requires_grad_()
    assert torch.autograd.grad(view.predict(one).square().sum(), one)[0].abs().sum() > 0


@pytest.mark.parametrize("clients", [1, 5])
@pytest.mark.parametrize("name", ["two-sided in 4 bits", "transform", "grid", "with noise", "in two rounds"])
def test_what_arrives_differs_from_the_prediction_by_the_deviation_that_an_attacker_knows(name, clients):
    """On average over many numbers, whatever rounds or adds noise; numbers beyond the range have no error at all."""
    codec = fitted({"transform": TransformCodec(8), "grid": GridCodec(0.5)}.get(name, ChainCodec([TwoSidedCodec(4), QuantizeCodec(4)])))
    view = CodeView(codec)
    updates = bank().recorded[:clients, 0].double()
    if name == "with noise":
        view = NoisyView(view, clip=2 * float(view.predict(updates).norm() + 20), noise=0.02)
    if name == "in two rounds":
        view, updates = RoundsView(view, 2), torch.cat([updates, updates.flip(1)], dim=1)
    predicted = view.predict(updates)
    seen = torch.stack([view.observe(updates, torch_generator("draw", i)) for i in range(100)])
    deviation = view.deviation(seen[0], clients)
    assert ((seen.mean(0) - predicted) / deviation).abs().max() < 0.6
    assert float(((seen - predicted) / deviation).square().mean()) == pytest.approx(1, rel=0.25)


def test_numbers_that_arrive_exactly_have_next_to_no_deviation():
    updates = bank().recorded[0, :3].double()
    for view in (View(), CodeView(fitted(LinearCodec(4, block_size=32)))):
        seen = view.observe(updates, torch_generator())
        assert (view.deviation(seen, 3) < 2e-3 * seen.square().mean().sqrt()).all()


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_who_knows_all_summands_but_one_sees_that_one_and_the_noise_of_the_sum(noise):
    inner = CodeView(fitted(ChainCodec([TwoSidedCodec(4), QuantizeCodec(4)])))
    view = NoisyView(inner, clip=5.0, noise=noise)
    updates = bank().recorded[0, :4].double()
    seen = view.observe(updates, torch_generator("draw"), known=3)
    generator = torch_generator("draw")
    last = [view.send(update, generator) for update in updates][-1]
    torch.testing.assert_close(seen, last + view.sum_noise(len(last), generator))


def test_rounds_lie_one_behind_the_other():
    codec = fitted(LinearCodec(4, block_size=32))
    view, updates = RoundsView(CodeView(codec), 3), bank().recorded[:3, :2].double()
    joined = updates.transpose(0, 1).flatten(1)
    seen = view.observe(joined, torch_generator())
    torch.testing.assert_close(seen, torch.cat([CodeView(codec).observe(part, torch_generator()) for part in updates]))
    torch.testing.assert_close(view.predict(joined), seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(view.decoded(seen), CodeView(codec).decoded(seen[: codec.encoder.code_dim]))


def test_a_decoded_view_is_the_codecs_own_reconstruction():
    codec = fitted(ChainCodec([TwoSidedCodec(4), QuantizeCodec(8)]))
    view, updates = CodeView(codec), bank().recorded[0, :3]
    seen = view.observe(updates.double(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(view.decoded(seen).float(), codec.reconstruct(updates), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("codec", [QSGDCodec(8), TopKCodec(4), PowerSGDCodec(1)], ids=lambda codec: type(codec).__name__)
def test_a_codec_without_gradients_or_sums_is_refused(codec):
    with pytest.raises(ConfigurationError, match="Expected a codec"):
        CodeView(fitted(codec))


def test_noise_has_the_deviation_that_it_says_and_messages_are_clipped():
    updates = torch.eye(4, 6, dtype=torch.float64) * torch.tensor([3.0, 0.5, 2.0, 1.0], dtype=torch.float64)[:, None]
    still = NoisyView(View(), clip=1.0, noise=0.0)
    assert still.observe(updates, torch_generator()).mul(4).tolist() == [1.0, 0.5, 1.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(still.predict(updates), still.observe(updates, torch_generator()))
    noisy = NoisyView(View(), clip=2.0, noise=0.5)
    drawn = torch.stack([4 * noisy.observe(0 * updates, torch_generator("noise", i)) for i in range(2000)])
    assert drawn.std().item() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    "options", [{"clients": 0}, {"batch_size": 0}, {"local_steps": 0}, {"noise": -1.0}, {"clip": 0.0}, {"known": 1}, {"rounds": 0}]
)
def test_a_sight_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=f"Expected `{next(iter(options))}`"):
        Observation(**options)


def test_a_victims_update_is_what_sgd_does():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    victim = Victim(network, nn.CrossEntropyLoss(), Pixels(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)), lr=0.2, steps=3)
    x, y = torch.rand(4, 1, 4, 4, generator=torch_generator("x")), torch.tensor([0, 1, 2, 1])
    update = victim.update(x, y)
    before = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x.double()), y).backward()
        optimizer.step()
    torch.testing.assert_close(update, before - torch.cat([p.detach().reshape(-1) for p in network.parameters()]))
    again = victim.update(x.double().requires_grad_(), y)
    torch.testing.assert_close(again.detach(), update)
    assert again.requires_grad
    assert victim.bytes_per_image(x) > 0
