"""QSGD: stochastic rounding to a few levels of each bucket's norm.

Alistarh, Grubic, Li, Tomioka & Vojnovic 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding"
(arXiv 1610.02132), Section 3.1, Eq. 4::

    Q_s(v)_i = ||v||_2 * sgn(v_i) * xi_i,      xi_i = (l + 1)/s with probability s |v_i| / ||v||_2 - l, else l/s,

where l is the integer part of s |v_i| / ||v||_2. Levels take a fixed number of bits here, without the paper's Elias code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.errors import require, require_choice
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat, JointFormat

Norm = Literal["l2", "max"]
LARGEST = torch.finfo(torch.float32).max


def bucket_norms(values: Tensor, norm: Norm) -> Tensor:
    """Return the norms ``[..., buckets]`` of buckets ``[..., buckets, bucket]``, in float32, no smaller than any entry."""
    order = 2.0 if norm == "l2" else math.inf
    exact = torch.linalg.vector_norm(values.double(), order, dim=-1)
    # Rounding to float32 must not put an entry beyond the last level.
    return torch.maximum(exact.clamp(max=LARGEST).float(), values.abs().amax(-1).float())


def round_to_levels(values: Tensor, norms: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Return signed levels (whole numbers, float64) ``[..., buckets, bucket]`` with ``E[level] * norm / levels == value`` (Eq. 4)."""
    scaled = values.double() / norms.double().clamp(min=torch.finfo(torch.float64).tiny)[..., None] * levels
    noise = torch.rand(scaled.shape, generator=generator, dtype=torch.float64).to(scaled.device)
    return (scaled + noise).floor_().clamp_(-levels, levels)


class QSGDEncoder(Encoder):
    """Cuts the update into buckets and rounds each to levels of its norm."""

    def __init__(self, layout: Layout, format: JointFormat, bucket: int, norm: Norm) -> None:
        super().__init__(layout, format)
        self.norms, self.levels = format.parts
        self.bucket = bucket
        self.norm: Norm = norm

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return every bucket's norm, then every entry's level ``[..., buckets + dim]`` (float64) of updates ``[..., dim]``."""
        padded = F.pad(update, (0, self.norms.length * self.bucket - self.dim))
        buckets = padded.reshape(*update.shape[:-1], self.norms.length, self.bucket)
        scales = bucket_norms(buckets, self.norm)
        rounded = round_to_levels(buckets, scales, self.levels.limit, private.generator)
        return torch.cat([scales.double(), rounded.flatten(-2)[..., : self.dim]], dim=-1)


class QSGDDecoder(Decoder):
    """Scales every client's levels by that client's norms, and averages the result."""

    def __init__(self, layout: Layout, format: JointFormat, bucket: int) -> None:
        super().__init__(layout, format)
        self.norms, self.levels = format.parts
        self.bucket = bucket

    def open(self, code: Tensor) -> Tensor:
        """Return the decoded update ``[..., dim]``, float32."""
        scales = code[..., : self.norms.length].repeat_interleave(self.bucket, dim=-1)[..., : self.dim]
        return (code[..., self.norms.length :] / self.levels.limit * scales).float()

    def sum_length(self, step: int = 0) -> int:
        """Return the length of an update, because the server sums decoded updates."""
        return self.dim

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the mean of the decoded updates ``[..., dim]``."""
        return mean_code


class QSGDCodec(Codec):
    """Rounds each bucket of an update to levels of the bucket's own norm, without bias.

    The norms are the client's own, so codes cannot be summed: the server decodes every message and its running sum has ``dim``
    entries, not ``code_dim`` (the stated exception of law 3).

    Args:
        bits: bits of an entry, sign included: 2^(bits-1) - 1 levels; 2 to 16.
        bucket: numbers per norm (the paper's experiments use 512); smaller buckets take more bytes and have less variance.
        norm: `l2` as in Eq. 4, or `max`, which the paper's experiments prefer: the largest entry then uses the last level.
    """

    additive = False
    unbiased = True

    def __init__(self, bits: int = 8, bucket: int = 512, norm: Norm = "l2") -> None:
        require(2 <= bits <= 16, f"Expected `bits` in 2..16 but got {bits}")
        require(bucket >= 1, f"Expected `bucket` >= 1 but got {bucket}")
        require_choice("norm", norm, ("l2", "max"))
        self.bits = bits
        self.bucket = bucket
        self.norm: Norm = norm

    def _format(self, layout: Layout) -> JointFormat:
        return JointFormat((CodeFormat(math.ceil(layout.dim / self.bucket)), CodeFormat(layout.dim, self.bits)))

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        return QSGDEncoder(layout, self._format(layout), self.bucket, self.norm)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        return QSGDDecoder(layout, self._format(layout), self.bucket)
