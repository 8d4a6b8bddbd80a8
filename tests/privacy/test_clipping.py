"""A client's share in a sum is bounded, exactly and whatever comes in; the norm finds its quantile."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.privacy.clipping import clip_integers, clip_norm, move_clip, shrink, split_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)
VECTORS = st.lists(VALUES, min_size=1, max_size=40)


@given(values=VECTORS, bound=st.floats(1e-3, 1e3), half=st.booleans())
def test_no_float_code_is_longer_than_the_bound(values, bound, half):
    code = torch.tensor(values)
    clipped = clip_norm(code, bound, torch.float16 if half else None)
    assert clipped.dtype == (torch.float16 if half else torch.float32)
    assert float(clipped.double().norm()) <= bound
    if not torch.isfinite(code).all():
        assert not clipped.any()
    elif not half and float(code.double().norm()) <= bound:
        assert torch.equal(clipped, code)
    elif not half and float(code.double().norm()) < 1e6 * bound:
        assert float(clipped.double().norm()) >= 0.999 * bound
        assert torch.nn.functional.cosine_similarity(clipped.double(), code.double(), dim=0) > 0.999


@given(values=VECTORS, bound=st.floats(0.1, 1e4), seed=st.integers(0, 100))
def test_no_integer_code_is_longer_than_the_bound(values, bound, seed):
    code = clip_integers(torch.tensor(values), bound, generator(seed))
    assert code.dtype == torch.int64
    assert int(code.square().sum()) <= bound**2


@given(values=st.lists(st.integers(-127, 127), min_size=1, max_size=60), bound=st.floats(0.0, 300), seed=st.integers(0, 100))
def test_integers_that_are_short_enough_stay_and_others_keep_sign_and_range(values, bound, seed):
    code = torch.tensor(values)
    clipped = clip_integers(code, bound, generator(seed))
    assert int(clipped.square().sum()) <= bound**2
    assert (clipped.abs() <= code.abs()).all() and (clipped * code >= 0).all()
    if int(code.square().sum()) <= bound**2:
        assert torch.equal(clipped, code)


def test_rounding_small_entries_would_lengthen_a_code_and_does_not():
    """A thousand entries of a tenth have norm 3.2; rounded to 0 and 1 they would have norm 10."""
    code = torch.full((1000,), 0.1)
    for seed in range(50):
        assert int(clip_integers(code, 4.0, generator(seed)).square().sum()) <= 16


def test_shrinking_takes_no_more_than_it_must():
    code = torch.randint(-5, 6, (200,), generator=generator())
    bound = 0.9 * float(code.double().norm())
    for seed in range(20):
        left = float(shrink(code, bound, generator(seed)).square().sum())
        assert bound**2 - 2 * 5 <= left <= bound**2


def test_a_clipped_integer_code_points_where_the_code_does():
    code = 30 * torch.randn(400, generator=generator())
    mean = torch.stack([clip_integers(code, 100.0, generator(seed)).double() for seed in range(200)]).mean(0)
    assert torch.nn.functional.cosine_similarity(mean, code.double(), dim=0) > 0.995


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6), min_size=2, max_size=6), st.booleans())
def test_taking_a_client_away_moves_the_sum_by_at_most_the_bound(codes, integers):
    """The sensitivity that noise is scaled to."""
    clipped = [
        clip_integers(torch.tensor(c), 3.0, generator(i)).double() if integers else clip_norm(torch.tensor(c), 3.0).double()
        for i, c in enumerate(codes)
    ]
    whole = torch.stack(clipped).sum(0)
    for left_out in range(len(codes)):
        rest = torch.stack([c for i, c in enumerate(clipped) if i != left_out]).sum(0)
        assert float((whole - rest).norm()) <= 3.0 + 1e-9


@given(start=st.floats(-4, 4), quantile=st.sampled_from([0.2, 0.5, 0.9]))
def test_the_norm_converges_to_the_quantile_from_both_sides(start, quantile):
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, 2000)
    wanted = float(np.quantile(norms, quantile))
    clip = wanted * math.exp(start)
    distances = []
    for _ in range(400):
        distances.append(abs(math.log(clip / wanted)))
        clip = move_clip(clip, float((norms <= clip).mean()), quantile, 0.2)
    assert clip == pytest.approx(wanted, rel=0.05)
    assert all(later <= earlier + 0.21 for earlier, later in pairwise(distances))
    assert abs((norms <= clip).mean() - quantile) < 0.03


def test_the_norm_falls_where_all_are_inside_and_rises_where_none_is():
    assert move_clip(1.0, 1.0, 0.5, 0.2) == pytest.approx(math.exp(-0.1))
    assert move_clip(1.0, 0.0, 0.5, 0.2) == pytest.approx(math.exp(0.1))


@given(z=st.floats(0.1, 3.0), bits=st.floats(2.0, 100.0))
def test_split_noise_adds_up_to_the_multiplier(z, bits):
    """Releases compose by inverse squares; a centred bit has sensitivity one half."""
    codes = split_noise(z, bits)
    assert codes >= z
    assert codes**-2 + (bits / 0.5) ** -2 == pytest.approx(z**-2)


def test_bits_that_take_everything_leave_no_noise_that_would_do():
    assert split_noise(2.0, 1.0) == math.inf
