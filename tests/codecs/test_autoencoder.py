from __future__ import annotations

import pytest
import torch

from fedlight.codecs import AutoencoderCodec, LinearCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, TrainCodec
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER


def untrained(codec: Codec, bank: UpdateBank) -> dict[str, float]:
    return {}


def lbfgs(codec: Codec, bank: UpdateBank) -> dict[str, float]:
    """Full-batch L-BFGS in float64 on the recorded cohorts, until next to nothing moves."""
    codec.encoder.double()
    codec.decoder.double()
    updates = bank.updates.double()
    target = updates.mean(1)
    parameters = [*codec.encoder.parameters(), *codec.decoder.parameters()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=300, max_eval=600, history_size=20, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (codec.reconstruct(updates) - target).square().sum() / target.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    codec.encoder.float()
    codec.decoder.float()
    return {"loss": float(closure_value(codec, bank))}


def closure_value(codec: Codec, bank: UpdateBank) -> torch.Tensor:
    target = bank.updates.mean(1)
    with torch.no_grad():
        return (codec.reconstruct(bank.updates) - target).square().sum() / target.square().sum()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("blocks", "size"), [("rows", 13), ("flat", 19)])  # neither needs padding
@pytest.mark.parametrize("ratio", [4, 8])
def test_a_linear_autoencoder_learns_pca(blocks: str, size: int, ratio: float, banks: tuple[UpdateBank, UpdateBank]) -> None:
    """From a random start, and it cannot do better: PCA is the best linear code (Baldi & Hornik 1989)."""
    bank = banks[0]
    pca = LinearCodec(ratio, "pca", blocks, size, cohort=0)
    pca.fit(bank, untrained)
    autoencoder = AutoencoderCodec(ratio, blocks, size, depth=0, start="random", cohort=0)
    figures = autoencoder.fit(bank, lbfgs)
    assert autoencoder.plan == pca.plan
    best = float(closure_value(pca, bank))
    start = AutoencoderCodec(ratio, blocks, size, depth=0, start="random", cohort=0)
    start.fit(bank, untrained)
    assert closure_value(start, bank) > 2 * best
    assert figures["loss"] <= 1.02 * best
    assert figures["loss"] >= best * (1 - 1e-4)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_pca_start_decodes_exactly_what_pca_decodes(depth: int, banks: tuple[UpdateBank, UpdateBank]) -> None:
    fit, held = banks
    autoencoder = AutoencoderCodec(4, block_size=16, depth=depth, width=8)
    autoencoder.fit(fit, untrained)
    pca = LinearCodec(4, block_size=16)
    pca.fit(fit, untrained)
    torch.testing.assert_close(autoencoder.reconstruct(held.updates), pca.reconstruct(held.updates), atol=1e-5, rtol=1e-4)


def test_training_improves_on_the_pca_start_where_the_code_is_curved() -> None:
    """Updates on a parabola in two dimensions: one number says it all, but no linear map of it does."""
    t = torch.randn(200, 1, 1, generator=torch.Generator().manual_seed(0))
    bank = UpdateBank(torch.cat([t, 0.5 * t.square(), 0 * t, 0 * t], dim=-1), Layout.vector(4))
    pca = LinearCodec(4, "pca", "flat", 4)
    pca.fit(bank, untrained)
    autoencoder = AutoencoderCodec(4, "flat", 4, width=16, bias=True)
    assert autoencoder.fit(bank, lbfgs)["loss"] < 0.1 * float(closure_value(pca, bank))


def test_both_halves_are_trained(banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec) -> None:
    before, after = (AutoencoderCodec(4, block_size=16, width=8) for _ in range(2))
    before.fit(banks[0], untrained)
    after.fit(banks[0], adam)
    for half in ("encoder", "decoder"):
        a, b = getattr(before, half).state_dict(), getattr(after, half).state_dict()
        assert all(torch.equal(a[key], b[key]) == (key in ("scale", "rest")) for key in a)  # no biases: zero is decoded to zero


def test_without_biases_a_zero_update_has_a_zero_code(banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec) -> None:
    zero, private = torch.zeros(banks[0].layout.dim), Private(torch.Generator())
    codec = AutoencoderCodec(4, block_size=16, width=8)
    codec.fit(banks[0], adam)
    assert not codec.encoder.encode(zero, Context(), private).any()
    biased = AutoencoderCodec(4, block_size=16, width=8, bias=True)
    biased.fit(banks[0], adam)
    assert biased.encoder.encode(zero, Context(), private).any()


def test_codes_do_not_depend_on_the_unit_of_the_updates(banks: tuple[UpdateBank, UpdateBank]) -> None:
    """The public scale per group takes it out: a codec fitted to updates a thousand times as large makes the same codes."""
    fit, held = banks
    codes = []
    for factor in (1.0, 1024.0):
        codec = AutoencoderCodec(4, block_size=16, width=8, start="random")
        codec.fit(UpdateBank(fit.updates * factor, fit.layout), untrained)
        codes.append(codec.encoder.encode(held.updates * factor, Context(), Private(torch.Generator())))
    torch.testing.assert_close(*codes)


def test_a_group_without_energy_stays_finite(layout: Layout, banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec) -> None:
    updates = banks[0].updates.clone()
    updates[..., :48] = 0
    codec = AutoencoderCodec(4, block_size=16, width=8)
    codec.fit(UpdateBank(updates, layout), adam)
    assert torch.isfinite(codec.reconstruct(updates)).all() and torch.isfinite(codec.reconstruct(banks[1].updates)).all()


def test_the_start_comes_from_the_seed_alone(banks: tuple[UpdateBank, UpdateBank]) -> None:
    prints = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        codec = AutoencoderCodec(4, block_size=16, width=8, start="random", seed=seed)
        codec.fit(banks[0], untrained)
        prints.append([t.clone() for t in codec.encoder.state_dict().values()])
    same, other = ([torch.equal(a, b) for a, b in zip(prints[0], prints[i], strict=True)] for i in (1, 2))
    assert all(same) and not all(other)


def test_networks_have_the_layers_that_were_asked_for(layout: Layout) -> None:
    def sizes(**arguments: object) -> list[tuple[int, ...]]:
        codec = AutoencoderCodec(4, "flat", 19, start="random", **arguments).bind(layout)
        return sorted(tuple(p.shape) for p in codec.encoder.parameters())

    assert sizes(depth=0) == sizes(activation="linear", depth=3) == [(4, 19)]
    assert sizes(depth=2, width=5) == [(4, 5), (4, 19), (5, 5), (5, 19)]
    assert sizes(depth=1, width=5, skip=False) == [(4, 5), (5, 19)]
    assert sizes(depth=1, width=5, skip=False, bias=True) == [(4,), (4, 5), (5,), (5, 19)]


PUBLISHED = {
    # EGA (Zeng et al. 2022, arXiv 2205.13216; 4x): blocks of the flat update, 512 -> 128, ReLU networks of width 512 without a linear
    # map beside them. Their public code also has a residual connection around one inner layer, which is left out.
    "EGA": (
        {"ratio": 4, "block_size": 512, "depth": 3, "width": 512, "activation": "relu", "bias": True},
        128,
    ),
    # The shape of a plain block autoencoder: 512 -> 16 through one layer of 1,024 units, tanh (32x).
    "block autoencoder": (
        {"ratio": 32, "block_size": 512, "depth": 1, "width": 1024, "activation": "tanh", "bias": True},
        16,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_can_be_configured(name: str) -> None:
    """They build, learn in a few steps, and send the bytes that they claim."""
    arguments, code = PUBLISHED[name]
    layout = Layout(("w", "b"), ((62, 33), (2,)))  # 2,048: four blocks
    generator = torch.Generator().manual_seed(0)
    bank = UpdateBank(torch.randn(6, 3, 4, generator=generator) @ torch.randn(4, layout.dim, generator=generator) * 0.01, layout)

    def few_steps(codec: Codec, bank: UpdateBank) -> dict[str, float]:
        optimizer = torch.optim.Adam([*codec.encoder.parameters(), *codec.decoder.parameters()], lr=1e-3)
        target, losses = bank.updates.mean(1), []
        for _ in range(15):
            optimizer.zero_grad()
            loss = (codec.reconstruct(bank.updates) - target).square().sum() / target.square().sum()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return {"first": losses[0], "last": losses[-1]}

    codec = AutoencoderCodec(blocks="flat", skip=False, start="random", **arguments)
    figures = codec.fit(bank, few_steps)
    assert figures["last"] < 0.8 * figures["first"]
    assert {(network.layers[0].in_features, network.layers[-1].out_features) for network in codec.encoder.networks} == {(512, code)}
    sizes: list[int] = []
    simulate_round(codec, bank.updates[0], on_message=lambda step, client, message: sizes.append(len(message)))
    assert sizes == [HEADER.size + 4 * 4 * code] * 3
