"""Integer codes: stochastic rounding on a public grid, so that codes can be summed exactly and take few bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, ServerContext, State, TrainCodec
from fedlight.core.errors import require
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat, JointFormat

Runs = list[tuple[int, int]]
"""(bits, number of coefficients) of the parts of a code, one behind the other."""


def integer_format(runs: Runs) -> CodeFormat | JointFormat:
    """Return the format of a code whose parts have these widths."""
    parts = tuple(CodeFormat(count, bits) for bits, count in runs)
    return parts[0] if len(parts) == 1 else JointFormat(parts)


class QuantizeEncoder(Encoder):
    """Rounds every coefficient to a signed integer of a public step.

    ``step`` has an entry a coefficient ``[dim]``, or one for all ``[1]``; ``runs`` says how many bits each part of the code has.

    Attributes:
        rounding: variance of rounding a number within the range, in squared steps, averaged over where it lies between two integers.
    """

    limit: Tensor
    rounding: float = 1 / 6

    def __init__(self, layout: Layout, runs: Runs, one_step: bool = False) -> None:
        super().__init__(layout, integer_format(runs))
        self.step = nn.Buffer(torch.ones(1 if one_step else layout.dim))
        limits = [torch.full((count,), float((1 << (bits - 1)) - 1)) for bits, count in runs]
        self.limit = nn.Buffer(torch.cat(limits) if len(runs) > 1 else limits[0][:1], persistent=False)

    def common_step(self, context: Context) -> float | None:
        """Return the step with the gain, if there is one for all coefficients."""
        return float(self.step) * float(context.broadcast.get("gain", 1.0)) if self.step.numel() == 1 else None

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return integers ``[..., dim]`` (int32) with ``E[code] * step * gain == update`` inside the range."""
        scaled = update / (self.step * float(context.broadcast.get("gain", 1.0)))
        noise = torch.rand(scaled.shape, generator=private.generator).to(scaled.device)
        return (scaled + noise).floor_().clamp(-self.limit, self.limit).to(torch.int32)


class QuantizeDecoder(Decoder):
    """Scales the mean integer back, and predicts from it how large the next round's codes will be: one public gain.

    How a client's code size goes with the size of the mean code is learned from the bank: a line through (log size of the mean,
    log size of the clients' codes), one point a round. Late in training updates cancel more, so that slope is below 1.
    """

    linear_map = True

    def __init__(self, layout: Layout, runs: Runs, smoothing: float, one_step: bool = False) -> None:
        super().__init__(layout, integer_format(runs))
        self.smoothing = smoothing
        self.step = nn.Buffer(torch.ones(1 if one_step else layout.dim))
        self.line = nn.Buffer(torch.tensor([0.0, 0.0, 0.0]))  # slope, intercept, log gain of the first round
        # Energy between rounds and within one, the bank's cohort size, and the variance of rounding one code: all a coefficient's mean.
        self.moments = nn.Buffer(torch.tensor([1.0, 0.0, 1.0, 1 / 6]))

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return ``mean_code * step * gain`` ``[..., dim]`` and move the next round's gain to what this mean predicts."""
        gain = float(context.broadcast.get("gain", 1.0))
        if self.smoothing < 1 and isinstance(context, ServerContext) and context.clients:
            between, within, cohort, rounding = self.moments.tolist()
            measured = float(mean_code.double().square().mean())
            # Less the shares of rounding, which is smaller where most codes round to zero, and of privacy's noise: never to nothing.
            power = max(measured - rounding / context.clients - context.noise, 0.1 * measured)
            if power > 0:
                same_cohort = (between + within / cohort) / (between + within / context.clients)
                slope, intercept, _ = self.line.tolist()
                predicted = intercept + slope * 0.5 * math.log(power * gain**2 * same_cohort)
                state["gain"] = math.exp(self.smoothing * math.log(gain) + (1 - self.smoothing) * predicted)
        return mean_code * (self.step * gain)

    def coordinates(self, update: Tensor) -> Tensor:
        """Return ``update / step`` ``[..., dim]``."""
        return update / self.step

    def broadcast(self, state: State) -> State:
        """Return the gain of the coming round."""
        return {"gain": state.get("gain", math.exp(float(self.line[2])))}

    def fit_gain(self, mean: Tensor, spread: Tensor, clients: int, rounding: float = 1 / 6) -> None:
        """Fit the line from mean codes to clients' codes over the bank's rounds.

        ``mean`` ``[rounds]``: energy of a coefficient of the round's mean code, in squared steps; ``spread`` ``[rounds]``: variance of
        the clients' codes around it; ``clients``: size of the recorded cohorts; ``rounding``: variance of rounding one code.
        """
        client = (mean + spread).double()
        x = mean.double().clamp(min=1e-30).log() / 2
        y = (client / client.mean()).clamp(min=1e-30).log() / 2
        deviation = (x - x.mean()).square().sum()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / deviation if deviation > 1e-6 else torch.zeros((), dtype=torch.float64)
        slope = slope.clamp(0, 1)
        self.line.copy_(torch.stack([slope, y.mean() - slope * x.mean(), y[0]]))
        # The spread of a finite cohort around its own mean is short of the clients' variance by one part in `clients`.
        within = spread.double().mean()
        moments = [max(float(mean.double().mean() - within / clients), 1e-12), max(float(within), 1e-12), float(clients), rounding]
        self.moments.copy_(torch.tensor(moments))


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
        require(2 <= bits <= 16, f"Expected `bits` in 2..16 but got {bits}")
        require(clip > 0, f"Expected `clip` > 0 but got {clip}")
        require(0 <= smoothing <= 1, f"Expected `smoothing` in [0, 1] but got {smoothing}")
        self.bits = bits
        self.clip = clip
        self.smoothing = smoothing

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        return QuantizeEncoder(layout, [(self.bits, layout.dim)])

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        return QuantizeDecoder(layout, [(self.bits, layout.dim)], self.smoothing)

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the grid from the standard deviations of the bank's coefficients ``[dim]``."""
        assert isinstance(self.encoder, QuantizeEncoder)
        assert isinstance(self.decoder, QuantizeDecoder)
        updates = bank.updates
        deviation = updates.square().mean((0, 1)).sqrt()
        # A coefficient that is zero in the whole bank still gets a (small) step, so that it can be sent when it wakes up.
        deviation = deviation.clamp(min=max(1e-3 * float(deviation.square().mean().sqrt()), 1e-30))
        step = deviation * (self.clip / float(self.encoder.limit[0]))
        self.encoder.step.copy_(step)
        self.decoder.step.copy_(step)
        scaled = updates / step
        means = scaled.mean(1, keepdim=True)
        self.decoder.fit_gain(means.square().mean((1, 2)), (scaled - means).square().mean((1, 2)), bank.clients)
        return {}
