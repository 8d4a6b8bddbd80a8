"""Integer codes: stochastic rounding on a public grid, so that codes can be summed exactly and take few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Decoder, Encoder, Plan, Private, Public, State, TrainCodec
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat


class QuantizeEncoder(Encoder):
    """Rounds every coefficient to a signed integer of a public step."""

    step: Tensor

    def __init__(self, layout: Layout, bits: int) -> None:
        super().__init__(layout, CodeFormat(layout.dim, bits))
        self.register_buffer("step", torch.ones(layout.dim))

    def encode(self, update: Tensor, public: Public, private: Private) -> Tensor:
        """Return integers ``[..., dim]`` (int32) with ``E[code] * step * gain == update`` inside the range."""
        limit = self.format.limit
        scaled = update / (self.step * public.announced.get("gain", 1.0))
        noise = torch.rand(scaled.shape, generator=private.generator).to(scaled.device)
        return (scaled + noise).floor_().clamp_(-limit, limit).to(torch.int32)


class QuantizeDecoder(Decoder):
    """Scales the mean integer back, and follows the size of the codes with one public gain."""

    step: Tensor
    reference: Tensor

    def __init__(self, layout: Layout, bits: int, track: float) -> None:
        super().__init__(layout, CodeFormat(layout.dim, bits))
        self.track = track
        self.register_buffer("step", torch.ones(layout.dim))
        # Second moments, in steps, of the bank's codes: between rounds, within a round, and the gain of its first round.
        self.register_buffer("reference", torch.tensor([1.0, 0.0, 1.0]))

    def decode(self, mean_code: Tensor, public: Public, state: State) -> Tensor:
        """Return ``mean_code * step * gain`` ``[..., dim]`` and move the next round's gain towards what this mean shows."""
        gain = public.announced.get("gain", 1.0)
        if self.track and public.clients:
            between, within, _ = self.reference.tolist()
            expected = between + within / public.clients
            rounding = 1 / (6 * public.clients)
            measured = max(float(mean_code.double().square().mean()) - rounding, 0.01 * expected)
            factor = (measured / expected) ** (self.track / 2)
            state["gain"] = gain * min(max(factor, 0.5), 2.0)
        return mean_code * (self.step * gain)

    def announce(self, state: State) -> State:
        """Return the gain of the coming round."""
        return {"gain": state.get("gain", float(self.reference[2]))}


class QuantizeCodec(Codec):
    """Stochastic rounding to ``bits``-bit integers on a grid per coefficient times one public gain.

    The grid comes from the bank (standard deviations of each coefficient), the gain from the previous aggregate: both are known
    before the round. Inside the range the rounding is unbiased; outside it saturates. Chain it behind any codec with float codes.

    Args:
        bits: bits a coefficient takes on the wire, 2 to 16.
        clip: the range ends at this many standard deviations of the coefficient.
        track: how fast the gain follows the size of the aggregates: 0 keeps it, 1 follows at once.
    """

    linear = False
    needs_fit = True

    def __init__(self, bits: int = 4, clip: float = 3.0, track: float = 0.5) -> None:
        if not 2 <= bits <= 16 or clip <= 0 or not 0 <= track <= 1:
            raise ConfigurationError(f"Expected `bits` in 2..16, `clip` > 0 and `track` in [0, 1] but got {bits}, {clip} and {track}")
        self.bits = bits
        self.clip = clip
        self.track = track

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        return QuantizeEncoder(layout, self.bits)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        return QuantizeDecoder(layout, self.bits, self.track)

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the grid from the standard deviations of the bank's coefficients ``[dim]``."""
        assert isinstance(self.encoder, QuantizeEncoder)
        assert isinstance(self.decoder, QuantizeDecoder)
        deviation = bank.flat().square().mean(0).sqrt()
        # A coefficient that is zero in the whole bank still gets a (small) step, so that it can be sent when it wakes up.
        deviation = deviation.clamp(min=max(1e-3 * float(deviation.square().mean().sqrt()), 1e-30))
        step = deviation * (self.clip / self.encoder.format.limit)
        self.encoder.step.copy_(step)
        self.decoder.step.copy_(step)
        scaled = bank.updates / step
        means = scaled.mean(1, keepdim=True)
        first = float(scaled[0].square().mean() / scaled.square().mean()) ** 0.5
        self.decoder.reference.copy_(torch.stack([means.square().mean(), (scaled - means).square().mean(), torch.tensor(first)]))
        return {}
