from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlight.codecs import ChainCodec, LinearCodec, QuantizeCodec, TransformCodec, TwoSidedCodec
from fedlight.codecs.factors import factor_bytes
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import ENCODER_FILE, save_codec
from fedlight.core.layout import Layout


def fitted(codec: Codec, bank: UpdateBank) -> Codec:
    codec.fit(bank, lambda *_: {})
    return codec


def error(codec: Codec, bank: UpdateBank, relative: bool = False) -> float:
    """Squared error of the decoded means over the bank's, in all or relative to each round's."""
    means = bank.updates.mean(1)
    lost = (codec.reconstruct(bank.updates) - means).square().sum(-1)
    return float((lost / means.square().sum(-1)).mean() if relative else lost.sum() / means.square().sum())


def test_full_rank_and_many_bits_are_the_identity(banks):
    codec = fitted(TwoSidedCodec(1, factor_bits=16, encoder_share=100), banks[0])
    assert codec.encoder.code_dim == banks[0].layout.dim
    torch.testing.assert_close(codec.reconstruct(banks[1].updates), banks[1].updates.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_full_rank_is_the_identity_whatever_the_bits(bits, banks):
    """Orthonormal square factors lose nothing, wherever rounding turned them."""
    codec = fitted(TwoSidedCodec(1, factor_bits=bits, encoder_share=100), banks[0])
    torch.testing.assert_close(codec.reconstruct(banks[1].updates), banks[1].updates.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [2, 4, 10, 24])
def test_no_projection_of_as_many_numbers_beats_pca(ratio):
    """The principal components of the whole update bound every linear code of that length from below (Eckart and Young)."""
    layout = Layout(("w",), ((12, 10),))
    bank = UpdateBank(torch.randn(40, 3, 120, generator=torch.Generator().manual_seed(0)) @ torch.randn(120, 120) ** 3, layout)
    codec = fitted(TwoSidedCodec(ratio, cohort=0, factor_bits=16, encoder_share=100, relative=False), bank)
    values = torch.linalg.svdvals(bank.updates.mean(1).double()).square()
    bound = float(values[codec.encoder.code_dim :].sum() / values.sum())
    assert bound - 1e-9 <= error(codec, bank) <= 1


def test_one_round_is_coded_as_well_as_its_singular_values_allow():
    """For a single matrix the best bases are its singular vectors, and as many coefficients keep as many singular values."""
    layout = Layout(("w",), ((9, 7),))
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    bank = UpdateBank(matrix.reshape(1, 1, 63), layout)
    values = torch.linalg.svdvals(matrix).square()
    for kept in (1, 3, 7):
        codec = fitted(TwoSidedCodec(63 / kept, cohort=0, factor_bits=16, encoder_share=100), bank)
        assert codec.encoder.code_dim == kept
        assert error(codec, bank) == pytest.approx(float(values[kept:].sum() / values.sum()), abs=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_more_budget_never_adds_error_on_the_bank(relative, banks):
    errors = [
        error(fitted(TwoSidedCodec(ratio, cohort=0, factor_bits=16, encoder_share=100, relative=False), banks[0]), banks[0])
        for ratio in (40, 20, 10, 6, 4, 3, 2, 1.5, 1)
    ]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    shares = [
        error(fitted(TwoSidedCodec(3, cohort=0, factor_bits=16, encoder_share=share, relative=relative), banks[0]), banks[0], relative)
        for share in (0.15, 0.3, 0.6, 3)
    ]
    assert all(later <= earlier + 0.01 for earlier, later in pairwise(shares))


@pytest.mark.parametrize("make", [TwoSidedCodec, TransformCodec], ids=["two-sided", "transform"])
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_exported_factors_weigh_no_more_than_their_share_of_the_model(make, share, banks, tmp_path):
    codec = fitted(make(3, encoder_share=share), banks[0])
    save_codec(codec, tmp_path)
    tensors = load_file(tmp_path / ENCODER_FILE)
    factors = sum(t.numel() * t.element_size() for name, t in tensors.items() if "factors" in name)
    half = codec.encoder if make is TwoSidedCodec else codec.encoder.stage(0)
    assert factors == factor_bytes(half.factors.shapes, codec.factor_bits) <= share * 4 * banks[0].layout.dim
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= factors + 8


def test_it_decodes_to_what_the_kept_coefficients_span(banks):
    """Encoding what was decoded changes nothing: a projection."""
    codec = fitted(TwoSidedCodec(4), banks[0])
    once = codec.reconstruct(banks[1].updates[:, :1])
    torch.testing.assert_close(codec.reconstruct(once[:, None]), once, rtol=1e-4, atol=1e-6)
    private = Private(torch.Generator())
    code = codec.encoder.encode(banks[1].updates[0, 0], Context(), private)
    assert float(code.norm()) == pytest.approx(float(once[0].norm()), rel=1e-5)
    assert float(once[0].norm()) <= codec.decoder.norm_bound(code, Context()) <= 1.02 * float(once[0].norm())


@pytest.mark.parametrize("relative", [True, False])
def test_energy_correction_gives_the_banks_means_their_length_back(relative, banks):
    plain, corrected = (fitted(TwoSidedCodec(6, cohort=0, correct_energy=c, relative=relative), banks[0]) for c in (False, True))
    means = banks[0].updates.mean(1)
    weights = 1 / means.square().sum(-1) if relative else torch.ones(len(means))

    def energy(updates: Tensor) -> float:
        return float((updates.square().sum(-1) * weights).sum())

    decoded = plain.reconstruct(banks[0].updates)
    boost = (energy(means) / energy(decoded)) ** 0.5
    assert boost > 1.05 and float(corrected.decoder.boost) == pytest.approx(boost, rel=1e-4)
    torch.testing.assert_close(corrected.reconstruct(banks[1].updates), boost * plain.reconstruct(banks[1].updates), rtol=1e-4, atol=1e-7)
    assert energy(corrected.reconstruct(banks[0].updates)) == pytest.approx(energy(means), rel=1e-4)
    code = torch.ones(corrected.encoder.code_dim)
    assert corrected.decoder.norm_bound(code, Context()) == pytest.approx(boost * plain.decoder.norm_bound(code, Context()), rel=1e-4)


def test_before_fitting_it_keeps_the_first_entries(layout):
    codec = TwoSidedCodec(4).bind(layout)
    update = torch.randn(layout.dim, generator=torch.Generator().manual_seed(0))
    decoded = codec.reconstruct(update[None])
    kept = decoded != 0
    assert kept.sum() == codec.encoder.code_dim and torch.equal(decoded[kept], update[kept])


def test_it_goes_before_other_codecs(banks):
    chain = fitted(ChainCodec([TwoSidedCodec(2), LinearCodec(2, "pca", "flat", 0), QuantizeCodec(8)]), banks[0])
    assert error(chain, banks[1]) < 0.7 and chain.encoder.code_dim == math.floor(math.floor(banks[0].layout.dim / 2) / 2)


@pytest.mark.parametrize(
    "changes", [{"ratio": 0.5}, {"cohort": -1}, {"rank": 0}, {"factor_bits": 1}, {"factor_bits": 17}, {"encoder_share": 0}]
)
@pytest.mark.parametrize("make", [TwoSidedCodec, TransformCodec])
def test_numbers_out_of_range_are_refused(make, changes):
    (name,) = changes
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        make(**changes)


def test_a_failed_fit_leaves_the_version(banks):
    codec = TwoSidedCodec(4, encoder_share=1e-9)
    with pytest.raises(ConfigurationError, match="raise `encoder_share`"):
        fitted(codec, banks[0])
    assert codec.version == 0 and not codec.fitted
