"""Half precision: updates as 16-bit floats, the least that a compression has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlight.codecs.identity import IdentityDecoder
from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat

LARGEST = torch.finfo(torch.float16).max


class HalfEncoder(Encoder):
    """Rounds the update to half precision."""

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return ``update`` ``[..., dim]`` rounded to float16, clamped to its range."""
        return update.clamp(-LARGEST, LARGEST).half()


class HalfDecoder(IdentityDecoder):
    """Returns the mean update."""

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return ``mean_code`` ``[..., dim]``, float32."""
        return mean_code.float()


class HalfCodec(Codec):
    """Sends every update in full as float16 (IEEE 754 binary16): half the bytes, additive.

    The error of an entry is at most 2^-11 of it, or 3e-8 if that is larger. Entries beyond +-65504 are clamped.
    """

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        return HalfEncoder(layout, CodeFormat(layout.dim, dtype=torch.float16))

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        return HalfDecoder(layout, CodeFormat(layout.dim, dtype=torch.float16))
