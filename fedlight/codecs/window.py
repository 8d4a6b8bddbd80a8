"""Integers whose sums are counted in windows: the fixed widths that masks need, at the size of the sums that come about.

A code that no cohort can overflow needs room for the sum of its largest integers, and the sum of ten clients' codes fills a third of it.
Counted modulo a window of some deviations of the sum (Nazer & Gastpar 2011, IEEE Trans. Inf. Theory 57(10)) a coefficient takes a bit less.
Put it behind a codec that gathers the energy, such as `TwoSidedCodec`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlight.codecs.quantize import QuantizeDecoder, QuantizeEncoder
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, ServerContext, State, TrainCodec
from fedlight.core.errors import CodecMismatchError, ConfigurationError, require
from fedlight.core.inflate import deflate_text, inflate_text
from fedlight.core.layout import Layout
from fedlight.core.windows import Run, WindowFormat
from fedlight.core.wire import HEADER

LIMITS = torch.tensor(sorted({math.ceil(2 ** (n / 2)) for n in range(33)}))
"""The limits that windows can have: half an octave apart, so that they pack well and a code has few of them."""

CUTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2)
"""Deviations of a client's coefficient, in steps, under which it is left out: that of the least expected error is taken."""

RISING, FALLING = 0.3, 0.8
"""How much of the old gain stays in one that grows and in one that shrinks: a sum that is too large costs more than a window that is."""

FIRST = 1.5
"""How much larger than the bank's the first round's sums may be."""

GROWTH = 3.0
"""How much of itself is added to the gain where nothing of a sum could be read: for the next to fit, or one of the next."""

LARGEST = 1e20
"""The largest gain, and one over the smallest: float32 holds the step times either."""


@dataclass(frozen=True)
class Deviations:
    """Second moments of coefficients ``[dim]``, where a cohort's sum has one of 1 on average: of a mean of no spread, and of the spread.

    Attributes:
        first: root mean square of the sums' coefficients in the bank's first round.
    """

    between: Tensor
    within: Tensor
    first: float

    @classmethod
    def of(cls, bank: UpdateBank, clients: int) -> Deviations:
        """Return those of sums of ``clients``; every round counts the same, whatever its size."""
        moments, sizes = torch.zeros(2, bank.layout.dim, dtype=torch.float64), []
        for updates in bank:
            mean = updates.double().mean(0)
            within = (updates - mean).square().sum(0) / max(bank.clients - 1, 1)
            between = mean.square() - within / bank.clients
            size = float(clients**2 * between.mean().clamp(min=0) + clients * within.mean())
            moments += torch.stack([between, within]) / max(size, 1e-60)
            sizes.append(math.sqrt(size))
        between, within = moments / bank.rounds
        return cls(between.clamp(min=0), within, max(sizes[0], 1e-20))


class WindowEncoder(QuantizeEncoder):
    """Rounds the coefficients in use to the nearest whole numbers of one public step; clients' updates differ, so errors average out."""

    rounding = 1 / 12

    def __init__(self, layout: Layout, format: WindowFormat, order: Tensor, step: float) -> None:
        super().__init__(layout, [(2, layout.dim)], one_step=True)
        self.format = format
        self.step.fill_(step)
        self.limit = torch.cat([torch.full((run.length,), float(run.limit)) for run in format.parts])
        self.order = nn.Buffer(order, persistent=False)

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return integers ``[..., code_dim]`` (int32), within the limits of their windows."""
        scaled = update.index_select(-1, self.order) / (self.step * float(context.broadcast.get("gain", 1.0)))
        return scaled.round_().clamp(-self.limit, self.limit).to(torch.int32)


class WindowDecoder(QuantizeDecoder):
    """Scales the mean integer back, and keeps sums at the size that windows are made for: one public gain, from the last sum's size."""

    def __init__(self, layout: Layout, format: WindowFormat, order: Tensor, step: float) -> None:
        super().__init__(layout, [(2, layout.dim)], smoothing=0.0, one_step=True)
        self.format = format
        self.step.fill_(step)
        self.order = nn.Buffer(order, persistent=False)

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return ``mean_code * step * gain`` ``[..., dim]``, 0 for coefficients that are left out; set the next round's gain."""
        gain = float(context.broadcast.get("gain", 1.0))
        predicted: State = {}
        code = super().decode(mean_code, context, predicted)
        if isinstance(context, ServerContext):
            new = predicted.get("gain", gain / 4)  # of a sum that is 0 all over nothing is predicted
            if context.lost:  # what was lost was large: the sum is not as small as it looks
                new = max(new, gain) * (1 + GROWTH * context.lost)
            kept = RISING if new > gain else FALLING
            state["gain"] = min(max(gain**kept * new ** (1 - kept), 1 / LARGEST), LARGEST)
        return code.new_zeros(*code.shape[:-1], self.layout.dim).index_copy(-1, self.order, code)

    def coordinates(self, update: Tensor) -> Tensor:
        """Return ``update / step`` ``[..., code_dim]`` of the coefficients in use."""
        return update.index_select(-1, self.order) / self.step


class WindowCodec(Codec):
    """Rounding to one public step, and room for the sums that come about: for secure aggregation of codes of equal weight.

    A sum lies within its window nearly always: it is as wide as `tails` deviations of the sum to both sides, by the bank's. One that does
    not comes back at the other end. Checks in the message tell which these are, up to three of 128 coefficients, and they are put right;
    of more the 128 are left out, and the next round's gain is raised. Nothing of it is silent: both are logged. In the clear sums never
    leave their windows.

    Args:
        ratio: how many times smaller a masked message is than the coefficients in float32, header and checks included.
        clients: how many codes are summed at most: the aggregator's `cohort`.
        tails: half of a window's width in standard deviations of the sum, at least 2. Less than 3 overflows too often to be put right.

    Raises:
        ConfigurationError: if a number is out of range, or the ratio leaves no room for a code.
    """

    needs_fit = True
    integer = True

    def __init__(self, ratio: float = 6.0, clients: int = 10, tails: float = 3.5) -> None:
        require(ratio >= 1, f"Expected `ratio` >= 1 but got {ratio}")
        require(clients >= 1, f"Expected `clients` >= 1 but got {clients}")
        require(tails >= 2, f"Expected `tails` >= 2 but got {tails}")
        self.ratio = ratio
        self.clients = clients
        self.tails = tails
        self.most_clients = clients

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the windows of the coefficients, packed (0 leaves one out), and the step that they are counted in."""
        if bank is None:
            windows, step = torch.ones(layout.dim, dtype=torch.long), 1.0
            windows[max(0, 4 * (int(4 * layout.dim / self.ratio) - HEADER.size)) :] = 0
        else:
            windows, step = self._choose(layout, Deviations.of(bank, self.clients))
        if not windows.any():
            raise ConfigurationError(
                f"Expected a `ratio` that leaves room for a code but at {self.ratio:g} one of {layout.dim:,} numbers has "
                f"{int(4 * layout.dim / self.ratio)} bytes: choose a smaller `ratio`"
            )
        return {"windows": deflate_text(windows.byte().numpy().tobytes()), "step": step}

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        return WindowEncoder(layout, *self._unpack(layout, plan), plan["step"])

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        return WindowDecoder(layout, *self._unpack(layout, plan), plan["step"])

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the gain of the first round, and what the size of a mean code tells of the gain that it should have had."""
        decoder, found = self.decoder, Deviations.of(bank, self.clients)
        assert isinstance(decoder, WindowDecoder)
        between, within = (float(moment[decoder.order].mean()) for moment in (found.between, found.within))
        mean = max(between + within / self.clients, 1e-30)
        decoder.line.copy_(torch.tensor([1.0, math.log(self.plan["step"]) - math.log(mean) / 2, math.log(FIRST * found.first)]))
        decoder.moments.copy_(torch.tensor([between, within, float(self.clients), WindowEncoder.rounding]))
        return {}

    def _choose(self, layout: Layout, found: Deviations) -> tuple[Tensor, float]:
        """Return which limit every coefficient has (0: none; ``[dim]``) and the step of least expected error whose message fits."""
        # Some sums were small by chance in the bank's few rounds: none has less than its clients' own energy.
        mean = (found.between + found.within / self.clients).clamp(min=0)
        client = found.between + found.within
        total = torch.maximum(self.clients**2 * mean, self.clients * client)

        def at(step: float, cut: float) -> Tensor:
            deviations = (total / step**2 + self.clients * WindowEncoder.rounding).sqrt()
            windows = torch.searchsorted(LIMITS.double(), self.tails * deviations).clamp(max=len(LIMITS) - 1) + 1
            return torch.where(client.sqrt() > cut * step, windows, 0)

        best, least = (torch.zeros(layout.dim, dtype=torch.long), 1.0), math.inf
        for cut in CUTS:
            low, high = (float(client.max().sqrt()) * factor for factor in (1e-5, 10))
            while high / low > 1.01:
                step = math.sqrt(low * high)
                low, high = (low, step) if self._bytes(at(step, cut)) <= 4 * layout.dim / self.ratio else (step, high)
            windows = at(high, cut)
            error = float(mean[windows == 0].sum() + mean[windows > 0].clamp(max=WindowEncoder.rounding * high**2 / self.clients).sum())
            if error < least and windows.any():
                best, least = (windows, high), error
        return best

    def _bytes(self, windows: Tensor) -> int:
        return HEADER.size + (self._format(windows).masked_bytes if windows.any() else 0)

    def _format(self, windows: Tensor) -> WindowFormat:
        counts = torch.bincount(windows, minlength=len(LIMITS) + 1)[1:].tolist()
        return WindowFormat(tuple(Run(limit, n) for limit, n in zip(LIMITS.tolist(), counts, strict=True) if n), self.clients)

    def _unpack(self, layout: Layout, plan: Plan) -> tuple[WindowFormat, Tensor]:
        """Return the format and where the code's entries lie among the coefficients ``[code_dim]``: narrow windows first."""
        raw = bytearray(inflate_text(plan["windows"], layout.dim, "windows"))
        windows = torch.frombuffer(raw, dtype=torch.uint8).long() if raw else torch.zeros(0, dtype=torch.long)
        if not windows.any() or int(windows.max()) > len(LIMITS):
            raise CodecMismatchError(f"Expected windows of 1 to {len(LIMITS)}, 0 where there is none, but got none or others")
        order = windows.argsort(stable=True)
        return self._format(windows), order[windows[order] > 0]
