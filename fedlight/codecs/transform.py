"""Transform coding: a learned two-sided basis that gathers the energy, then bits where the energy is.

The basis is that of `TwoSidedCodec`; the bits are those of `fedlight.codecs.allocation` (reverse water-filling under an exact budget of
message bytes); rounding and the public gain are those of `QuantizeCodec`, with one step for all coefficients, so that an encoder
weighs hardly more than its factors. Codes are integers and are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.codecs.allocation import WIDTHS, Allocation, Cost, allocate, masked_cost, plain_cost
from fedlight.codecs.chain import ChainDecoder, ChainEncoder
from fedlight.codecs.matrices import Matrices
from fedlight.codecs.moments import TwoSidedMoments, measure
from fedlight.codecs.probes import BITS, ProbedDecoder, ProbedEncoder, probe_length
from fedlight.codecs.quantize import QuantizeDecoder, QuantizeEncoder, Runs
from fedlight.codecs.selection import Selection, select, split_grids
from fedlight.codecs.two_sided import (
    TwoSidedDecoder,
    TwoSidedEncoder,
    TwoSidedOptions,
    coded_bytes,
    coded_plan,
    cohort_energy,
    correct_energy,
    round_weights,
    set_factors,
)
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Decoder, Encoder, Plan, TrainCodec
from fedlight.core.errors import ConfigurationError, require, require_least
from fedlight.core.layout import Layout
from fedlight.core.wire import HEADER


@dataclass(eq=False)
class TransformCodec(TwoSidedOptions):
    """Learned two-sided basis, 2 to 8 bits a coefficient where they save most, stochastic rounding, one public gain.

    Args:
        ratio: at least how many times smaller a message is than the update in float32, header included; more where `encoder_share`
            pays for no more coefficients, or recorded updates have energy in no more directions.
        cohort: clients a round, over which rounding errors average out; what the bits are worth depends on it.
        rank: most columns of a factor.
        factor_bits: bits of a factor's entries; encoder and decoder compute with the same rounded factors.
        factor_coding: `fixed`: all entries have these bits; `entropy`: these are their mean, columns that carry more have more, and all
            are entropy-coded: half of the bytes or less at the same error.
        encoder_share: most bytes of the factors, as a share of the model's (float32).
        relative: whether recorded rounds count equally (else by their energy, so that early rounds dominate).
        correct_energy: whether the decoder gives the aggregate the length that the bank's mean updates have on average: more where the
            projection takes some away, less where rounding adds some.
        secure_cohort: if above 0, bits are counted as secure aggregation of so many clients needs them, headroom included.
        smoothing: how much of the old gain stays in the new one: 0 follows the last aggregate at once, 1 keeps the gain for ever.
        probes: random combinations of each matrix's rows and of its columns that a message has room for beside the coefficients, of
            what those leave out: with `CodecRefresh(history=...)` the codec learns new directions from the clients themselves.

    Raises:
        ConfigurationError: if a number is out of range, or the message too small for its header.
    """

    integer = True

    ratio: float = 128.0
    factor_bits: int | float = 6
    encoder_share: float = 0.22
    secure_cohort: int = 0
    smoothing: float = 0.5
    probes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, cohort=1, secure_cohort=0, probes=0)
        require(0 <= self.smoothing <= 1, f"Expected `smoothing` in [0, 1] but got {self.smoothing}")

    def budget(self, layout: Layout) -> int:
        """Return the bits that a message's coefficients may take: all of it but the header and the padding of its parts.

        Raises:
            ConfigurationError: if nothing is left.
        """
        probes = probe_length(Matrices.of(layout), self.probes) * self.cost(BITS)
        # Each part begins with a byte of its own; masked, its last numbers fill no whole group and take up to two bytes more.
        spare = HEADER.size + len(WIDTHS) - 1 + math.ceil(probes / 8) + 2 * (len(WIDTHS) if self.secure_cohort else 0)
        bits = 8 * (int(4 * layout.dim / self.ratio) - spare)
        if bits < self.cost(WIDTHS[1]):
            raise ConfigurationError(
                f"Expected a `ratio` that leaves room for a code but at {self.ratio} a message of {layout.dim:,} numbers has "
                f"{int(4 * layout.dim / self.ratio)} bytes and {spare} are spoken for: choose a smaller `ratio`, or fewer `probes`"
            )
        return bits

    @property
    def cost(self) -> Cost:
        """The bits that a coefficient takes on the wire, masked if sums are to be secure."""
        return masked_cost(self.secure_cohort) if self.secure_cohort else plain_cost

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return which coefficients have two bits before there is a bank, evenly spread; `fit` makes a plan of its own."""
        matrices = Matrices.of(layout)
        return Selection.unfitted(matrices, min(self.budget(layout) // 2, self._room(matrices)), 2).to_plan()

    def _room(self, matrices: Matrices) -> int:
        """Return how many coefficients there can be: a code is never longer than the update."""
        return max(1, matrices.layout.dim - probe_length(matrices, self.probes))

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        selection = Selection.from_plan(plan)
        basis: TwoSidedEncoder = TwoSidedEncoder(layout, selection, self.factor_bits, coded_bytes(plan))
        if self.probes:
            basis = ProbedEncoder(layout, selection, self.factor_bits, self.probes, coded_bytes(plan))
        return ChainEncoder(layout, [basis, QuantizeEncoder(Layout.vector(basis.code_dim), self._runs(layout, selection), one_step=True)])

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        selection = Selection.from_plan(plan)
        basis: TwoSidedDecoder = TwoSidedDecoder(layout, selection, self.factor_bits, coded_bytes(plan))
        if self.probes:
            basis = ProbedDecoder(layout, selection, self.factor_bits, self.probes, coded_bytes(plan))
        coded = Layout.vector(basis.code_dim)
        return ChainDecoder(layout, [basis, QuantizeDecoder(coded, self._runs(layout, selection), self.smoothing, one_step=True)])

    def _runs(self, layout: Layout, selection: Selection) -> Runs:
        """Return the widths of the coefficients and, last, of the probes."""
        probes = probe_length(Matrices.of(layout), self.probes)
        return [*selection.runs, *([(BITS, probes)] if probes else [])]

    def fit(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Measure the bank, spend the budget, and set both halves' factors, step and gain."""
        matrices = Matrices.of(bank.layout)
        moments = measure(bank, matrices, self.cohort, self.rank, self.relative)
        selection, factors, coded, step, kept = self._spend(bank, matrices, moments)
        self.version += 1
        self.bind(bank.layout, {**selection.to_plan(), **coded_plan(coded)})
        assert isinstance(self.encoder, ChainEncoder)
        assert isinstance(self.decoder, ChainDecoder)
        set_factors(self.encoder.stage(0), self.decoder.stage(0), factors, coded)
        quantize, restore = self.encoder.stage(1), self.decoder.stage(1)
        assert isinstance(quantize, QuantizeEncoder)
        assert isinstance(restore, QuantizeDecoder)
        quantize.step.fill_(step)
        restore.step.fill_(step)
        if self.probes:
            unit = self._probe_units(matrices, moments, kept) / step
            for half in (self.encoder.stage(0), self.decoder.stage(0)):
                assert isinstance(half, (ProbedEncoder, ProbedDecoder))
                half.unit.copy_(unit)
        restore.fit_gain(*self._sizes(matrices, moments, kept, step), bank.clients)
        if self.correct_energy:
            correct_energy(self, self.decoder.stage(0), bank, self.relative)
        self.update_digest()
        return {
            "coefficients": float(len(selection.order)),
            "factor_bytes": float(sum(t.nbytes for t in self.encoder.state_dict().values())),
        }

    def _sizes(self, matrices: Matrices, moments: TwoSidedMoments, kept: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Return energies ``[rounds]`` of an entry of mean codes and of clients' around them, in squared steps."""
        sent = torch.stack([moments.mean[:, kept].sum(1), moments.spread[:, kept].sum(1)], dim=1)
        probes = probe_length(matrices, self.probes)
        left_out = (moments.total - sent).clamp(min=0)
        # A client's probes have the energy of one squared step on average over the bank.
        codes = sent / step**2 + probes * left_out / left_out.sum(1).mean().clamp(min=1e-30)
        mean, spread = (codes / (int(kept.sum()) + probes)).unbind(1)
        return mean, spread

    def _probe_units(self, matrices: Matrices, moments: TwoSidedMoments, kept: Tensor) -> Tensor:
        """Return the deviation ``[matrices]`` of a client's probes of each matrix: that of an entry of what its code leaves out."""
        weights = round_weights(moments, self.relative)
        sent = split_grids(((moments.mean + moments.spread) * weights).mean(0) * kept, moments.grids)
        whole = (moments.clients * weights).mean(0)
        left_out = (whole - torch.stack([part.sum() for part in sent])).clamp(min=1e-30) + 1e-4 * whole
        sizes = torch.tensor([item.rows * item.columns for item in matrices.items])
        probed = torch.tensor([not item.plain for item in matrices.items])
        return (left_out / sizes).sqrt()[probed]

    def _spend(
        self, bank: UpdateBank, matrices: Matrices, moments: TwoSidedMoments
    ) -> tuple[Selection, list[Tensor], bytes, float, Tensor]:
        """Return the selection, its factors, those coded, the step, and which measured coefficients are kept (bool)."""
        energy = cohort_energy(moments, self.cohort, self.relative)
        weights = round_weights(moments, self.relative)
        deviation = ((moments.mean + moments.spread) * weights).mean(0).sqrt()
        budget = self.budget(bank.layout)
        tried: list[Allocation] = []
        taken = torch.zeros(len(energy), dtype=torch.bool)

        def choose(allowed: Tensor) -> tuple[Tensor, Tensor]:
            self.factors_full = not bool(allowed.all())
            # No more than one coefficient in two bits of budget can be kept: the others need not be looked at.
            offered = torch.where(allowed, energy, torch.zeros(()))
            places = offered.topk(min(budget // 2, len(offered), self._room(matrices))).indices
            allocation = allocate(offered[places], deviation[places], self.cohort, budget, self.cost, tried[-1].step if tried else None)
            worth = torch.where(allowed[places], allocation.bits, 0)
            tried.append(allocation)
            bits, saved = torch.zeros(len(energy), dtype=torch.long), torch.zeros(len(energy))
            bits[places], saved[places] = worth, (energy[places] - allocation.error) * (worth > 0)
            taken.copy_(bits > 0)
            return bits, saved

        selection, factors, worth = select(moments, matrices, choose, self.factor_bits, int(4 * bank.layout.dim * self.encoder_share))
        return selection, factors, self.coded(factors, worth), tried[-1].step, taken
