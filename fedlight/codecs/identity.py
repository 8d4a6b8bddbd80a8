"""The identity codec: updates are sent unchanged. The uncompressed reference of every comparison."""

from __future__ import annotations

from torch import Tensor

from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat


class IdentityEncoder(Encoder):
    """Returns the update."""

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return ``update`` ``[..., dim]``."""
        return update


class IdentityDecoder(Decoder):
    """Returns the mean update."""

    linear_map = True

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return ``mean_code`` ``[..., dim]``."""
        return mean_code

    def coordinates(self, update: Tensor) -> Tensor:
        """Return ``update`` ``[..., dim]``."""
        return update


class IdentityCodec(Codec):
    """Sends every update in full, as float32: FedAvg without compression."""

    linear = True
    unbiased = True

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        return IdentityEncoder(layout, CodeFormat(layout.dim))

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        return IdentityDecoder(layout, CodeFormat(layout.dim))
