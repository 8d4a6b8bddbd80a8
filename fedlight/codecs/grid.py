"""A fixed public grid: integer codes of one step and of any width, without training.

Under distributed differential privacy a client's noise lies on this grid, so it is finer and wider than a code alone needs
(Kairouz et al. 2021, arXiv 2102.06387, section 4).
"""

from __future__ import annotations

from fedlight.codecs.quantize import QuantizeDecoder, QuantizeEncoder
from fedlight.core.codec import Codec, Decoder, Encoder, Plan
from fedlight.core.errors import require, require_positive
from fedlight.core.layout import Layout


class GridCodec(Codec):
    """Stochastic rounding to integers of one fixed step; unbiased within ``+-step * (2**(bits-1) - 1)``.

    Args:
        step: size of a step, in the units of what is rounded.
        bits: bits per coefficient in a message, 2 to 24 (float32 cannot hold larger integers).

    Raises:
        ConfigurationError: if a number is out of range.
    """

    integer = True

    def __init__(self, step: float, bits: int = 18) -> None:
        require_positive(step=step)
        require(2 <= bits <= 24, f"Expected `bits` in 2..24 but got {bits}")
        self.step = step
        self.bits = bits

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        encoder = QuantizeEncoder(layout, [(self.bits, layout.dim)], one_step=True)
        encoder.step.fill_(self.step)
        return encoder

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder, whose gain is constant."""
        decoder = QuantizeDecoder(layout, [(self.bits, layout.dim)], smoothing=1.0, one_step=True)
        decoder.step.fill_(self.step)
        return decoder
