"""Bounds on one client's contribution to a sum, in the units of the noise.

Only the rounding of integers is random, and it need not be secret. Law: for any input, including NaN and Inf, the result's L2 norm is
at most the bound, exactly; a code that is not finite contributes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clip_norm(code: Tensor, bound: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return a float code ``[n]`` scaled down to L2 norm ``bound`` if it is longer, zeros if it is not finite, as ``dtype``.

    It checks the norm again in the type of the message, because rounding to it may make a code longer.
    """
    dtype = dtype or code.dtype
    if not torch.isfinite(code).all():
        return torch.zeros_like(code, dtype=dtype)
    length = float(code.double().norm())
    if length <= bound and dtype == code.dtype:
        return code
    scale = min(1.0, bound / length) if length else 1.0
    clipped = (code.double() * scale).to(dtype)
    while float(clipped.double().norm()) > bound:
        scale *= 1 - torch.finfo(dtype).eps
        clipped = (code.double() * scale).to(dtype)
    return clipped


def clip_integers(code: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Return integers ``[n]`` (int64) of L2 norm at most ``bound`` whose mean is a code ``[n]`` in units of its steps, scaled down.

    A code that is longer, or not integer, is scaled so that stochastic rounding gives the bound's square on average, and rounded; if its
    norm is still too large, units are removed from random entries (Kairouz et al. 2021, arXiv 2102.06387, section 4, round again until
    the norm fits; removing units always ends).
    """
    values = code.detach().double().cpu()
    if not torch.isfinite(values).all():
        return torch.zeros(values.shape, dtype=torch.int64)
    whole = values.round()
    if torch.equal(whole, values) and float(whole.square().sum()) <= bound**2:
        return whole.long()
    values = values * min(1.0, bound / float(values.norm()))
    values = values * _scale_to(values, bound**2)
    rounded = (values + torch.rand(values.shape, generator=generator, dtype=torch.float64)).floor().long()
    return shrink(rounded, bound, generator)


def shrink(code: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Return integers ``[n]`` after removing units from random entries until the L2 norm is at most ``bound``."""
    code = code.clone()
    while (excess := int(code.square().sum()) - bound**2) > 0:
        places = code.nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=generator)]
        saved = (2 * code[places].abs() - 1).cumsum(0)
        count = int((saved < excess).sum()) + 1
        code[places[:count]] -= code[places[:count]].sign()
    return code


def _scale_to(values: Tensor, energy: float) -> float:
    """Return the largest factor up to 1 with which stochastic rounding of ``values`` has at most this energy on average."""

    def expected(scale: float) -> float:
        scaled = values * scale
        fraction = scaled - scaled.floor()
        return float(scaled.square().sum() + (fraction * (1 - fraction)).sum())

    if expected(1.0) <= energy:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) <= energy else (low, middle)
    return low


def move_clip(clip: float, inside: float, quantile: float, rate: float) -> float:
    """Return the next clipping norm: ``clip * exp(-rate * (inside - quantile))``, where ``inside`` is the share of codes within it.

    If too many codes are inside, the norm falls; if too few, it rises, until ``quantile`` of the clients are inside (Andrew et al. 2021,
    arXiv 1905.03871, Algorithm 1).
    """
    return clip * math.exp(-rate * (inside - quantile))


def split_noise(noise_multiplier: float, bit_noise: float) -> float:
    """Return the remaining multiplier for the codes if the clipping bits get noise of std ``bit_noise``.

    Both together are as private as ``noise_multiplier`` on the codes alone: ``(z^-2 - (2 bit_noise)^-2)^(-1/2)``, with bits centered
    around one half (Andrew et al. 2021, Theorem 1). Inf if nothing is left.
    """
    left = noise_multiplier**-2 - (2 * bit_noise) ** -2
    return left**-0.5 if left > 0 else math.inf
