"""The two-sided linear codec: a Tucker-2 (Kronecker-factored) projection of every weight matrix.

A weight matrix's update ``G`` ``[out, in]`` is sent as entries of ``A^T G B`` with learned orthonormal ``A`` ``[out, r1]`` and ``B``
``[in, r2]`` (Tucker 1966; De Lathauwer et al. 2000), and just those entries, over all matrices together, that carry most energy in
the bank. Decoding is ``A M B^T``: linear, so the mean of codes is the code of the mean, whatever the cohort.

Where a weight's rows are long because they read a feature map, ``B`` is the Kronecker product of a basis of channels and one of
positions (Tucker-3): a hundredth of the numbers, and learned from as many times fewer updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedlight.codecs.factors import Factors, code_columns
from fedlight.codecs.matrices import KeptProjection, Matrices, project, turn_back
from fedlight.codecs.moments import TwoSidedMoments, measure
from fedlight.codecs.selection import Selection, select, split_grids
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, CodecPart, Context, Decoder, Encoder, Plan, Private, State, TrainCodec
from fedlight.core.errors import require, require_choice, require_least
from fedlight.core.layout import Layout
from fedlight.core.wire import HEADER, CodeFormat


class _TwoSidedHalf(CodecPart):
    """What both halves hold: the factors and which coefficients are kept."""

    order: Tensor

    def __init__(self, layout: Layout, selection: Selection, factor_bits: float, coded: int = 0) -> None:
        super().__init__(layout, CodeFormat(int((selection.bits > 0).sum())))
        self.matrices = Matrices.of(layout)
        selection.check(self.matrices)
        self.grids = selection.grids
        self.factors = Factors(selection.factor_shapes(self.matrices), factor_bits, coded)
        self.register_buffer("order", selection.order, persistent=False)

    def bases(self) -> list[tuple[Tensor, ...]]:
        """Return the factors ``[n, r]`` of every side of every matrix, none of plain vectors."""
        factors = iter(self.factors.bases(self.order.device))
        return [tuple(next(factors) for _ in item.sides) for item in self.matrices.items]

    def middle(self, code: Tensor) -> list[Tensor]:
        """Return one grid of coefficients ``[..., r1, r2, ..]`` a matrix of codes ``[..., code_dim]``, zero where nothing was sent."""
        flat = code.new_zeros(*code.shape[:-1], sum(map(math.prod, self.grids))).index_copy(-1, self.order, code)
        return split_grids(flat, self.grids)

    def expand(self, code: Tensor) -> list[Tensor]:
        """Return the matrices ``[..., rows, columns]`` of codes ``[..., code_dim]``."""
        views = []
        for item, grid, bases in zip(self.matrices.items, self.middle(code), self.bases(), strict=True):
            view = turn_back(grid, bases)
            views.append(view.flatten(-2) if item.parts else view)
        return views


class TwoSidedEncoder(_TwoSidedHalf, Encoder):
    """Projects from both sides and keeps the chosen coefficients."""

    def __init__(self, layout: Layout, selection: Selection, factor_bits: float, coded: int = 0) -> None:
        super().__init__(layout, selection, factor_bits, coded)
        self.projection = KeptProjection(self.matrices, split_grids(selection.bits > 0, selection.grids), selection.order)

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]``."""
        projected: Tensor = self.projection(update, self.bases())
        return projected


class TwoSidedDecoder(_TwoSidedHalf, Decoder):
    """Maps coefficients back with the same factors."""

    linear_map = True

    boost: Tensor

    def __init__(self, layout: Layout, selection: Selection, factor_bits: float, coded: int = 0) -> None:
        super().__init__(layout, selection, factor_bits, coded)
        self.register_buffer("boost", torch.ones(()))

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the update ``[..., dim]`` of mean coefficients ``[..., code_dim]``, times the energy correction."""
        return self.matrices.join(self.expand(mean_code * self.boost))

    def coordinates(self, update: Tensor) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]``, over the energy correction: factors are orthonormal."""
        return project(self.matrices, update, self.bases()).index_select(-1, self.order) / self.boost

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return the code's own length, for the factors are orthonormal (with room for rounding), times the energy correction."""
        return 1.01 * float(mean_code.norm() * self.boost)


@dataclass(eq=False)
class TwoSidedOptions(Codec):
    """A codec with the options of a learned two-sided basis; those of `TwoSidedCodec` and `TransformCodec` alike."""

    needs_fit = True
    factors_full = False
    """Whether `encoder_share` kept the last fit from coefficients that it would have taken."""

    ratio: float = 16.0
    cohort: int = 10
    rank: int = 128
    factor_bits: int | float = 8
    factor_coding: Literal["fixed", "entropy"] = "fixed"
    encoder_share: float = 1.0
    relative: bool = True
    correct_energy: bool = False

    def __post_init__(self) -> None:
        require_least(self, ratio=1, cohort=0, rank=1)
        require_choice("factor_coding", self.factor_coding, ("fixed", "entropy"))
        whole = self.factor_coding == "entropy" or self.factor_bits == int(self.factor_bits)
        told = f"Expected `factor_bits` in 2..16, and whole with `factor_coding` fixed, but got {self.factor_bits}"
        require(2 <= self.factor_bits <= 16 and whole, told)
        require(self.encoder_share > 0, f"Expected `encoder_share` > 0 but got {self.encoder_share}")

    def config(self) -> dict[str, Any]:
        """Return class path and arguments; what every client downloads names the factors' coding only where it is another."""
        config = super().config()
        if self.factor_coding == "fixed":
            del config["init_args"]["factor_coding"]
        return config

    def fitted_ratio(self) -> float:
        """Return how many times smaller a message of the bound codec is than the update in float32, header included."""
        return 4 * self.encoder.dim / (HEADER.size + self.encoder.format.payload_bytes)

    def coded(self, factors: list[Tensor], worth: list[Tensor]) -> bytes:
        """Return the factors entropy-coded by what their columns are worth; nothing where they have a fixed width."""
        return code_columns(factors, worth, self.factor_bits) if self.factor_coding == "entropy" else b""


@dataclass(eq=False)
class TwoSidedCodec(TwoSidedOptions):
    """Projects every weight matrix from the left and from the right on directions learned from recorded updates.

    Args:
        ratio: at least how many times shorter the code is than the update; more where `encoder_share` pays for no more coefficients, or
            recorded updates have energy in no more directions.
        cohort: cohort size whose mean update the projection is fitted to; 0 takes the recorded cohorts' means.
        rank: most columns of a factor.
        factor_bits: bits of a factor's entries; encoder and decoder compute with the same rounded factors.
        factor_coding: `fixed`: all entries have these bits; `entropy`: these are their mean, columns that carry more have more, and all
            are entropy-coded: half of the bytes or less at the same error.
        encoder_share: most bytes of the factors, as a share of the model's (float32).
        relative: whether recorded rounds count equally (else by their energy, so that early rounds dominate).
        correct_energy: whether the decoder lengthens the aggregate by what the projection takes away on average in the bank.

    Raises:
        ConfigurationError: if a number is out of range.
    """

    linear = True

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return which coefficients are kept before there is a bank, evenly spread; `fit` makes a plan of its own."""
        return Selection.unfitted(Matrices.of(layout), budget_numbers(layout, self.ratio), 1).to_plan()

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        return TwoSidedEncoder(layout, Selection.from_plan(plan), self.factor_bits, coded_bytes(plan))

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        return TwoSidedDecoder(layout, Selection.from_plan(plan), self.factor_bits, coded_bytes(plan))

    def fit(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Measure the bank, choose the coefficients and set both halves' factors."""
        matrices = Matrices.of(bank.layout)
        moments = measure(bank, matrices, self.cohort, self.rank, self.relative)
        energy = cohort_energy(moments, self.cohort, self.relative)
        count = budget_numbers(bank.layout, self.ratio)

        def choose(allowed: Tensor) -> tuple[Tensor, Tensor]:
            self.factors_full = not bool(allowed.all())
            offered = torch.where(allowed, energy, torch.zeros(()))
            best = offered.topk(min(count, len(offered))).indices
            bits = torch.zeros(len(offered), dtype=torch.long)
            bits[best[offered[best] > 0]] = 1
            return bits, offered * bits

        selection, factors, worth = select(moments, matrices, choose, self.factor_bits, int(4 * bank.layout.dim * self.encoder_share))
        coded = self.coded(factors, worth)
        self.version += 1
        self.bind(bank.layout, {**selection.to_plan(), **coded_plan(coded)})
        set_factors(self.encoder, self.decoder, factors, coded)
        if self.correct_energy:
            correct_energy(self, self.decoder, bank, self.relative)
        self.update_digest()
        return {}


def budget_numbers(layout: Layout, ratio: float) -> int:
    """Return the length of a code that is ``ratio`` times shorter than the update, at least one."""
    return max(1, int(layout.dim / ratio))


def cohort_energy(moments: TwoSidedMoments, cohort: int, relative: bool) -> Tensor:
    """Return the second moment ``[n]`` of the coefficients of a mean over ``cohort`` clients, averaged over rounds."""
    energy = moments.mean + (moments.spread / cohort if cohort else 0)
    return (energy * round_weights(moments, relative)).mean(0)


def round_weights(moments: TwoSidedMoments, relative: bool) -> Tensor:
    """Return weights ``[rounds, 1]`` that give every round's clients the same energy, or ones."""
    energy = moments.total.sum(1, keepdim=True)
    return energy.mean() / energy.clamp(min=1e-30) if relative else torch.ones_like(energy)


def coded_plan(coded: bytes) -> Plan:
    """Return what a plan says of entropy-coded factors: their bytes; nothing where they have a fixed width."""
    return {"factor_bytes": len(coded)} if coded else {}


def coded_bytes(plan: Plan) -> int:
    """Return the bytes of entropy-coded factors that a plan says there are; 0 where they have a fixed width."""
    return int(plan.get("factor_bytes", 0))


def set_factors(encoder: Encoder, decoder: Decoder, factors: list[Tensor], coded: bytes) -> None:
    """Give both halves the same factors, rounded the same."""
    for half in (encoder, decoder):
        assert isinstance(half, _TwoSidedHalf)
        if coded:
            half.factors.load(coded)
        else:
            half.factors.write(factors)


def correct_energy(codec: Codec, decoder: Decoder, bank: UpdateBank, relative: bool) -> None:
    """Set the codec's two-sided ``decoder``'s boost to how much longer the bank's mean updates are than what they are decoded to.

    A ratio of root mean squares over the bank's rounds, which follow one another as in a run: the gain of integer codes moves.
    """
    assert isinstance(decoder, TwoSidedDecoder)
    true = decoded = 0.0
    state: State = {}
    for updates in bank:
        energy = float(updates.mean(0).square().sum())
        weight = 1 / max(energy, 1e-30) if relative else 1.0
        true += weight * energy
        decoded += weight * float(codec.reconstruct(updates, state).square().sum())
    decoder.boost.fill_((true / max(decoded, 1e-30)) ** 0.5)
