"""Weights that read a feature map: their rows are channels times positions, and each has a basis of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlight.codecs import TransformCodec, TwoSidedCodec, matrices
from fedlight.codecs.matrices import Matrices, turn_back
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private
from fedlight.core.export import load_encoder, save_codec
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator

LAYOUT = Layout(("conv.weight", "conv.bias", "fc.weight", "fc.bias"), ((8, 2, 3, 3), (8,), (10, 8 * 15), (10,)))


@pytest.fixture(params=[1024, 100], ids=["two sides", "three sides"])
def sides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(matrices, "LONGEST_SIDE", request.param)
    return 2 if request.param == 1024 else 3


def bank(rounds: int, seed: int, clients: int = 4) -> UpdateBank:
    """Updates of a linear layer that reads few mixtures of channels at few patterns of positions; the rest is small."""
    basis, drawn = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    bases = [torch.linalg.qr(torch.randn(n, r, generator=basis))[0] for n, r in ((10, 6), (8, 4), (15, 5))]
    fc = turn_back(torch.randn(rounds, clients, 6, 4, 5, generator=drawn), bases).flatten(2)
    rest = 0.01 * torch.randn(rounds, clients, LAYOUT.dim - fc.shape[-1], generator=drawn)
    return UpdateBank(torch.cat([rest[..., :152], fc, rest[..., 152:]], -1), LAYOUT)


def fitted(codec: Codec, rounds: int = 6) -> Codec:
    codec.fit(bank(rounds, 0), lambda *_: {})
    return codec


def lost(codec: Codec, updates: Tensor) -> float:
    """Return the relative error of an aggregate of clients ``[clients, dim]``."""
    return float((codec.reconstruct(updates, {}) - updates.mean(0)).norm() / updates.mean(0).norm())


def test_the_layer_has_as_many_sides_as_it_should(sides: int) -> None:
    conv, fc, *bias = Matrices.of(LAYOUT).items
    assert len(fc.sides) == sides and len(conv.sides) == 2
    assert len(bias) == (sides == 3)


def test_few_updates_teach_a_basis_that_fits_new_ones() -> None:
    """As many numbers sent, less than half of the factors: the bases of three sides hold for updates that none of them saw."""
    errors = {}
    for longest in (1024, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matrices, "LONGEST_SIDE", longest)
            codec = TwoSidedCodec(ratio=LAYOUT.dim / 120, encoder_share=10.0)
            codec.fit(bank(2, 0, clients=1), lambda *_: {})
            errors[longest] = lost(codec, bank(1, 99).updates[0]), sum(t.nbytes for t in codec.encoder.state_dict().values())
    assert errors[100][0] < 0.1 < errors[1024][0]
    assert errors[100][1] < 0.5 * errors[1024][1]


def test_all_coefficients_are_the_update(sides: int) -> None:
    codec = fitted(TwoSidedCodec(ratio=1.0, factor_bits=16, encoder_share=10.0), rounds=40)
    for item, grid in zip(codec.encoder.matrices.items, codec.encoder.grids, strict=True):
        assert item.plain or sides == 2 or grid == item.shape
    if sides == 3:
        assert lost(codec, torch.randn(3, LAYOUT.dim, generator=torch.Generator().manual_seed(1))) < 1e-4


@pytest.mark.parametrize(
    "codec", [TwoSidedCodec(ratio=8, encoder_share=10.0), TransformCodec(ratio=16, cohort=4, encoder_share=10.0, probes=1)]
)
def test_codes_add_up_and_survive_a_file_and_a_wire(codec: Codec, sides: int, tmp_path) -> None:
    fitted(codec)
    updates, context = bank(1, 3).updates[0], Context(broadcast=codec.decoder.broadcast({}))
    messages = [codec.encoder.encode_message(u, context, Private(torch_generator("client", i))) for i, u in enumerate(updates)]
    aggregate = codec.decoder.decode_sum(messages, [1] * len(messages), context, {})
    assert float((aggregate - updates.mean(0)).norm() / updates.mean(0).norm()) < 0.5
    save_codec(codec, tmp_path)
    again = load_encoder(tmp_path / "encoder.safetensors")
    for i, (update, message) in enumerate(zip(updates, messages, strict=True)):
        assert again.encode_message(update, context, Private(torch_generator("client", i))) == message


@pytest.mark.parametrize("ratio", [1.0, 3, 8, 100])
def test_kept_coefficients_are_those_of_the_whole_projection(ratio: float, sides: int) -> None:
    codec = fitted(TwoSidedCodec(ratio, encoder_share=10.0))
    updates = bank(1, 5).updates
    whole, private = codec.decoder.coordinates(updates), Private(torch.Generator())
    assert torch.equal(codec.encoder.encode(updates, Context(), private), whole) or sides == 3
    for update, expected in ((updates, whole), (updates[0, 0], whole[0, 0])):
        code = codec.encoder.encode(update, Context(), private)
        assert torch.allclose(code, expected, atol=1e-5 * float(whole.abs().max())) and code.shape == expected.shape


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_factors_of_three_sides_weigh_no_more_than_they_may(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "LONGEST_SIDE", 100)
    codec = fitted(TwoSidedCodec(ratio=4, encoder_share=share))
    shapes = [tuple(factor.shape) for factor in codec.encoder.factors.bases(torch.device("cpu"))]
    assert sum(n * r for n, r in shapes) <= share * 4 * LAYOUT.dim
    grids = iter(codec.encoder.middle(torch.ones(codec.encoder.code_dim)))
    for grid in grids:
        for side in range(grid.ndim):  # every column that is downloaded is used
            assert grid.numel() == 0 or grid.sum([other for other in range(grid.ndim) if other != side]).all() or grid.shape[0] == 1
