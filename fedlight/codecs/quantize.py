"""Integer codes: stochastic rounding on a public grid, so that codes can be summed exactly and take few bits."""

from __future__ import annotations

import math

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
        scaled = update / (self.step * float(public.announced.get("gain", 1.0)))
        noise = torch.rand(scaled.shape, generator=private.generator).to(scaled.device)
        return (scaled + noise).floor_().clamp_(-limit, limit).to(torch.int32)


class QuantizeDecoder(Decoder):
    """Scales the mean integer back, and predicts from it how large the next round's codes will be: one public gain.

    How a client's code size goes with the size of the mean code is learned from the bank: a line through (log size of the mean,
    log size of the clients' codes), one point a round. Late in training updates cancel more, so that slope is below 1.
    """

    step: Tensor
    line: Tensor
    moments: Tensor

    def __init__(self, layout: Layout, bits: int, smoothing: float) -> None:
        super().__init__(layout, CodeFormat(layout.dim, bits))
        self.smoothing = smoothing
        self.register_buffer("step", torch.ones(layout.dim))
        self.register_buffer("line", torch.tensor([0.0, 0.0, 0.0]))  # slope, intercept, log gain of the first round
        self.register_buffer("moments", torch.tensor([1.0, 0.0, 1.0]))  # between rounds, within a round, the bank's cohort size

    def decode(self, mean_code: Tensor, public: Public, state: State) -> Tensor:
        """Return ``mean_code * step * gain`` ``[..., dim]`` and move the next round's gain to what this mean predicts."""
        gain = float(public.announced.get("gain", 1.0))
        if self.smoothing < 1 and public.clients:
            measured = float(mean_code.double().square().mean())
            # Less the rounding's share, which is smaller than this where most codes round to zero: never to nothing.
            power = max(measured - 1 / (6 * public.clients), 0.1 * measured)
            if power > 0:
                between, within, cohort = self.moments.tolist()
                same_cohort = (between + within / cohort) / (between + within / public.clients)
                slope, intercept, _ = self.line.tolist()
                predicted = intercept + slope * 0.5 * math.log(power * gain**2 * same_cohort)
                state["gain"] = math.exp(self.smoothing * math.log(gain) + (1 - self.smoothing) * predicted)
        return mean_code * (self.step * gain)

    def announce(self, state: State) -> State:
        """Return the gain of the coming round."""
        return {"gain": state.get("gain", math.exp(float(self.line[2])))}


class QuantizeCodec(Codec):
    """Stochastic rounding to ``bits``-bit integers on a grid per coefficient times one public gain.

    The grid comes from the bank (standard deviations of each coefficient), the gain from the previous aggregate: both are known
    before the round. Inside the range the rounding is unbiased; outside it saturates. Chain it behind any codec with float codes.

    Args:
        bits: bits a coefficient takes on the wire, 2 to 16.
        clip: the range ends at this many standard deviations of the coefficient.
        smoothing: how much of the old gain stays in the new one: 0 follows the last aggregate at once, 1 keeps the gain for ever.
    """

    needs_fit = True
    integer = True

    def __init__(self, bits: int = 4, clip: float = 3.0, smoothing: float = 0.5) -> None:
        if not 2 <= bits <= 16 or clip <= 0 or not 0 <= smoothing <= 1:
            raise ConfigurationError(
                f"Expected `bits` in 2..16, `clip` > 0 and `smoothing` in [0, 1] but got {bits}, {clip} and {smoothing}"
            )
        self.bits = bits
        self.clip = clip
        self.smoothing = smoothing

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        return QuantizeEncoder(layout, self.bits)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        return QuantizeDecoder(layout, self.bits, self.smoothing)

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
        self._fit_gain(bank.updates / step, self.decoder)
        return {}

    def _fit_gain(self, scaled: Tensor, decoder: QuantizeDecoder) -> None:
        """Fit the line from mean codes to clients' codes, in steps, over the bank's rounds ``[rounds, clients, dim]``."""
        means = scaled.mean(1, keepdim=True)
        within = (scaled - means).square().mean()
        x = means.square().mean((1, 2)).clamp(min=1e-30).log() / 2
        y = (scaled.square().mean((1, 2)) / scaled.square().mean()).clamp(min=1e-30).log() / 2
        spread = (x - x.mean()).square().sum()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / spread if spread > 1e-6 else torch.zeros(())
        slope = slope.clamp(0, 1)
        decoder.line.copy_(torch.stack([slope, y.mean() - slope * x.mean(), y[0]]))
        decoder.moments.copy_(
            torch.stack([means.square().mean() - within / scaled.shape[1], within, torch.tensor(scaled.shape[1])]).clamp(min=1e-12)
        )
