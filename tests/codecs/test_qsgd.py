from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.codecs import QSGDCodec
from fedlight.codecs.qsgd import bucket_norms, round_to_levels
from fedlight.core.codec import Context, Private
from fedlight.core.layout import Layout
from fedlight.core.wire import HEADER


def levels(values: list[float], s: int, norm: str = "l2", seed: int = 0) -> torch.Tensor:
    bucket = torch.tensor([values])
    return round_to_levels(bucket, bucket_norms(bucket, norm), s, torch.Generator().manual_seed(seed))[0]


def test_an_entry_becomes_one_of_its_two_neighbouring_levels_with_equation_4s_chances() -> None:
    """3/5 of 7 levels is 4.2: level 5 in a fifth of the draws; signs stay; 4/5 is 5.6."""
    drawn = torch.stack([levels([3.0, -4.0], 7, seed=seed) for seed in range(4000)])
    assert set(drawn[:, 0].tolist()) == {4.0, 5.0} and set(drawn[:, 1].tolist()) == {-5.0, -6.0}
    assert float((drawn[:, 0] == 5).double().mean()) == pytest.approx(0.2, abs=0.03)
    assert float((drawn[:, 1] == -6).double().mean()) == pytest.approx(0.6, abs=0.03)


def test_the_largest_entry_of_a_max_bucket_is_exact() -> None:
    for seed in range(50):
        drawn = levels([0.3, -2.0, 1.0], 7, "max", seed)
        assert drawn[1] == -7 and 0 <= drawn[0] <= 2


@given(n=st.integers(1, 200), bits=st.sampled_from([4, 8]), seed=st.integers(0, 50))
def test_the_variance_stays_below_lemma_3_1s_bound(n: int, bits: int, seed: int) -> None:
    """E||Q(v) - v||^2 <= min(n / s^2, sqrt(n) / s) ||v||^2, here for the mean of 100 draws."""
    s = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randn(1, n, generator=generator)
    norm = bucket_norms(bucket, "l2")
    many = bucket.expand(100, n)
    drawn = round_to_levels(many, norm.expand(100), s, generator) * norm / s
    error = (drawn - many).square().sum(-1).mean()
    assert error <= 1.5 * min(n / s**2, n**0.5 / s) * bucket.square().sum() + 1e-9


@given(dim=st.integers(1, 300), bucket=st.integers(1, 300), bits=st.integers(2, 16))
def test_a_message_holds_a_norm_for_each_bucket_and_the_levels(dim: int, bucket: int, bits: int) -> None:
    codec = QSGDCodec(bits, bucket).bind(Layout.vector(dim))
    message = codec.encoder.encode_message(torch.ones(dim), Context(), Private(torch.Generator()))
    assert len(message) == HEADER.size + 4 * math.ceil(dim / bucket) + math.ceil(dim * bits / 8)


def test_buckets_have_scales_of_their_own() -> None:
    update = torch.cat([1e6 * torch.ones(64), 1e-6 * torch.ones(64)])
    codec = QSGDCodec(8, 64, "max").bind(Layout.vector(128))
    code = codec.encoder.encode(update, Context(), Private(torch.Generator()))
    torch.testing.assert_close(codec.decoder.open(code), update)


@pytest.mark.parametrize("largest", [3e38, 1e-45, 1e-38])
def test_norms_at_the_ends_of_float32_put_no_entry_beyond_the_last_level(largest: float) -> None:
    update = torch.full((512,), largest)
    codec = QSGDCodec(4).bind(Layout.vector(512))
    opened = codec.decoder.open(codec.encoder.encode(update, Context(), Private(torch.Generator().manual_seed(0))))
    assert torch.isfinite(opened).all() and float(opened.double().mean()) == pytest.approx(float(update[0]), rel=0.25, abs=1e-44)
