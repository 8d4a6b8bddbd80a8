"""Entropy-coded integers: one public step, rounding with a dead zone, and as many bits as a coefficient tells.

At less than two bits a coefficient no fixed widths come near the rate-distortion bound; one uniform quantiser followed by an entropy coder
is a quarter of a bit away from it at high rates (Gish & Pierce 1968) and less at low ones (Sullivan 1996, IEEE Trans. Inf. Theory 42(5),
on dead zones). Put it behind a codec that gathers the energy, such as `TwoSidedCodec`, with some 20 coefficients for each float that a
message would hold.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedlight.codecs.quantize import QuantizeEncoder
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State, TrainCodec
from fedlight.core.entropy import LEVELS_PER_OCTAVE, TOP, EntropyFormat
from fedlight.core.errors import ConfigurationError
from fedlight.core.inflate import deflate_text, inflate_text
from fedlight.core.layout import Layout
from fedlight.core.wire import HEADER

ROUND_UP = 0.4
"""What is added before cutting to a whole number: entries below .6 steps become 0. Nearest (.5) errs 2 to 4 % more at the same bytes."""

RATE = 0.7
"""How much of a message's excess, relative to the bytes asked, the step's logarithm grows by: about what makes up for it at once."""

MOST_EXCESS = 2.0
LARGEST_GAIN = 2.0**30

SMALLEST = 1e-20
"""The smallest size of updates that a step is fitted to: float32 holds it over the largest gain."""


class EntropyEncoder(QuantizeEncoder):
    """Rounds every coefficient to a whole number of one public step, small ones to 0; nothing is drawn."""

    rounding = (1 - ROUND_UP) ** 2 / 3  # mean square of the numbers that become 0; that of the others is a little less

    def __init__(self, layout: Layout, levels: bytes) -> None:
        super().__init__(layout, [(EntropyFormat.bits, layout.dim)], one_step=True)
        self.format = EntropyFormat(levels)

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return integers ``[..., dim]`` (int32): magnitudes are cut to a whole number after ``ROUND_UP`` is added."""
        scaled = update / (self.step * float(context.broadcast.get("gain", 1.0)))
        return (scaled.abs() + ROUND_UP).floor_().minimum(self.limit).copysign(scaled).to(torch.int32)


class EntropyDecoder(Decoder):
    """Scales the mean integer back, and keeps messages at their length: the step grows where they were too long."""

    linear_map = True

    step: Tensor

    def __init__(self, layout: Layout, levels: bytes, message_bytes: float) -> None:
        super().__init__(layout, EntropyFormat(levels))
        self.message_bytes = message_bytes
        self.register_buffer("step", torch.ones(1))

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return ``mean_code * step * gain`` ``[..., dim]``."""
        return mean_code * (self.step * float(context.broadcast.get("gain", 1.0)))

    def coordinates(self, update: Tensor) -> Tensor:
        """Return ``update / step`` ``[..., dim]``."""
        return update / self.step

    def broadcast(self, state: State) -> State:
        """Return the gain on the step of the coming round."""
        return {"gain": state.get("gain", 1.0)}

    def record_lengths(self, mean_bytes: float, state: State) -> None:
        """Move the gain to where messages have the bytes that were asked for.

        Excesses add up in the gain's logarithm, so over many rounds their mean is next to nothing.
        """
        excess = min(mean_bytes / self.message_bytes - 1, MOST_EXCESS)
        gain = self.broadcast(state)["gain"] * math.exp(RATE * excess)
        state["gain"] = min(max(gain, 1 / LARGEST_GAIN), LARGEST_GAIN)


class EntropyCodec(Codec):
    """Rounding to one public step and entropy coding, at messages of a given mean length; for sums in the clear.

    The levels of coefficients come from the bank, the first step from its first round, every later step from how long the last round's
    messages were. Messages differ in length: masks cannot hide them, nor does the noise of differential privacy cover what lengths tell, so
    for either use `TransformCodec`.

    Args:
        ratio: how many times smaller a message is on average than its coefficients in float32, header included; at least 4.

    Raises:
        ConfigurationError: if the ratio is smaller than that, or leaves no room for a code.
    """

    needs_fit = True
    integer = True
    fixed_width = False

    def __init__(self, ratio: float = 20.0) -> None:
        if ratio < 4:
            raise ConfigurationError(f"Expected `ratio` >= 4 but got {ratio}: for finer codes use QuantizeCodec")
        self.ratio = ratio

    def message_bytes(self, layout: Layout) -> int:
        """Return the mean length that messages are kept at; raises ``ConfigurationError`` if it leaves no room for a code."""
        bytes = int(4 * layout.dim / self.ratio)
        if bytes < HEADER.size + 8:
            raise ConfigurationError(
                f"Expected a `ratio` that leaves room for a code but at {self.ratio:g} one of {layout.dim:,} numbers has {bytes} bytes "
                f"and {HEADER.size + 8} are the least: choose a smaller `ratio`"
            )
        return bytes

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the levels of the coefficients, packed, for they are part of what a client downloads."""
        levels = np.full(layout.dim, TOP) if bank is None else measure_levels(bank)
        return {"levels": deflate_text(levels.astype(np.uint8).tobytes())}

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        return EntropyEncoder(layout, _unpack(plan, layout))

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        return EntropyDecoder(layout, _unpack(plan, layout), self.message_bytes(layout))

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the step to that at which the bank's first round makes messages of the mean length."""
        assert isinstance(self.encoder, EntropyEncoder)
        assert isinstance(self.decoder, EntropyDecoder)
        updates, private = next(iter(bank)), Private(torch.Generator())
        high = 2 * float(updates.abs().max().clamp(min=SMALLEST))
        low = high / 2**20
        while high / low > 1.01:
            self.encoder.step.fill_(math.sqrt(low * high))
            length = self.mean_bytes(self.encoder.encode(updates, Context(), private))
            low, high = (low, math.sqrt(low * high)) if length < self.decoder.message_bytes else (math.sqrt(low * high), high)
        self.decoder.step.copy_(self.encoder.step)
        return {}


def measure_levels(bank: UpdateBank) -> np.ndarray:
    """Return the levels ``[dim]`` of a bank's deviations, the largest at ``TOP``; every round counts the same, whatever its size."""
    energy = torch.zeros(bank.layout.dim, dtype=torch.float64)
    for updates in bank:
        energy += updates.double().square().mean(0) / updates.double().square().mean().clamp(min=1e-60)
    relative = (energy / energy.max().clamp(min=1e-30)).clamp(min=1e-30)
    return (TOP + LEVELS_PER_OCTAVE * relative.log2() / 2).round().clamp(min=0).numpy()


def _unpack(plan: Plan, layout: Layout) -> bytes:
    return inflate_text(plan["levels"], layout.dim, "levels")
