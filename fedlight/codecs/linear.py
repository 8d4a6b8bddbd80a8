"""Linear codecs: orthonormal projection of blocks on principal directions, or on random ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedlight.codecs.blocks import Blocks, plan_blocks, principal_bases
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, CodecPart, Context, Decoder, Encoder, Plan, Private, State, TrainCodec
from fedlight.core.errors import require, require_choice, require_least
from fedlight.core.layout import Layout
from fedlight.core.linalg import qr
from fedlight.core.random import Part, torch_generator
from fedlight.core.wire import CodeFormat


def random_bases(blocks: Blocks, *path: Part) -> list[Tensor]:
    """Return random orthonormal columns ``[length, code]`` per group, computed on the CPU: the same bits for everybody."""
    drawn = [torch.randn(g.length, g.code, generator=torch_generator(*path, i)) for i, g in enumerate(blocks.groups)]
    return [qr(square)[0] for square in drawn]


class LinearHalf(CodecPart):
    """What encoder and decoder share: blocks and bases; with ``fresh`` (a seed) every round draws its own bases."""

    def __init__(self, blocks: Blocks, bases: BufferList, fresh: int | None = None) -> None:
        super().__init__(blocks.layout, CodeFormat(blocks.code_dim))
        self.blocks = blocks
        self.bases = bases
        self.fresh = fresh
        self._round = 0

    def bases_at(self, context: Context) -> BufferList:
        """Return the bases of the round: drawn once for all its messages, with the same result at any time."""
        if self.fresh is not None and context.round != self._round:
            for mine, drawn in zip(self.bases, random_bases(self.blocks, self.fresh, "fresh basis", context.round), strict=True):
                mine.copy_(drawn)
            self._round = context.round
        return self.bases


class LinearEncoder(LinearHalf, Encoder):
    """Projects every block on its group's basis."""

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]``."""
        cut = self.blocks.cut(update)
        return torch.cat([(block @ basis).flatten(-2) for block, basis in zip(cut, self.bases_at(context), strict=True)], dim=-1)


class LinearDecoder(LinearHalf, Decoder):
    """Maps coefficients back with the transposed bases."""

    def __init__(self, blocks: Blocks, bases: BufferList, fresh: int | None = None) -> None:
        super().__init__(blocks, bases, fresh)
        self.linear_map = fresh is None

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the update ``[..., dim]`` of mean coefficients ``[..., code_dim]``."""
        codes = self.blocks.split_code(mean_code)
        return self.blocks.join([code @ basis.T for code, basis in zip(codes, self.bases_at(context), strict=True)])

    def coordinates(self, update: Tensor) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]``: bases are orthonormal but where a last block is padded."""
        if not self.linear_map:
            return super().coordinates(update)
        codes = []
        real = self.blocks.cut(torch.ones_like(update))
        for block, mask, basis in zip(self.blocks.cut(update), real, self.bases, strict=True):
            filled = int(mask.reshape(-1, *mask.shape[-2:])[0, -1].sum())
            last = block[..., -1:, :filled] @ torch.linalg.pinv(basis[:filled]).T
            codes.append(torch.cat([block[..., :-1, :] @ basis, last], dim=-2).flatten(-2))
        return torch.cat(codes, dim=-1)

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return the code's own length, for the bases are orthonormal (with room for rounding)."""
        return 1.01 * float(mean_code.norm())


@dataclass(eq=False)
class LinearCodec(Codec):
    """Projects blocks of the update on an orthonormal basis; its transpose is its own decoder.

    With ``basis="pca"`` the basis holds the principal directions of the bank's cohort means, the best linear code for
    the squared error; with ``basis="random"`` it is drawn from a seed, the baseline that a learned code must beat.

    Args:
        ratio: length of the update divided by the length of the code.
        basis: `pca` (fitted to recorded updates) or `random` (from `seed`, nothing to download).
        blocks: `rows` cuts along the rows of weight matrices, one basis per tensor; `flat` cuts the flat update, one basis for all.
        block_size: largest number of weights in a block; 0 takes the whole update as one block (with `flat`).
        cohort: size of the cohorts whose means the basis is fitted to; 0 takes the recorded cohorts as they are.
        seed: seed of the random basis.
        fresh: draws a new random basis for every round, from `seed` and the round's number (with `random`; nothing to download): the next
            round's code may hold what this one leaves out.
    """

    linear = True

    ratio: float = 16.0
    basis: Literal["pca", "random"] = "pca"
    blocks: Literal["rows", "flat"] = "rows"
    block_size: int = 512
    cohort: int = 10
    seed: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        require_least(self, ratio=1, block_size=0, cohort=0)
        require_choice("basis", self.basis, ("pca", "random"))
        require_choice("blocks", self.blocks, ("rows", "flat"))
        self.needs_fit = self.basis == "pca"
        told = "Expected `basis` random with `fresh=true` but got 'pca': a fitted basis is the same every round"
        require(not (self.fresh and self.needs_fit), told)

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the blocks with their code lengths: by energy in the bank, or evenly without one."""
        return plan_blocks(layout, bank, self.ratio, self.blocks, self.block_size, self.cohort)

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        blocks = Blocks.from_plan(layout, plan)
        return LinearEncoder(blocks, self._bases(blocks), self.seed if self.fresh else None)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        blocks = Blocks.from_plan(layout, plan)
        return LinearDecoder(blocks, self._bases(blocks), self.seed if self.fresh else None)

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the bases to the principal directions of the bank's cohort means."""
        if self.basis == "pca":
            for i, basis in enumerate(principal_bases(bank, Blocks.from_plan(bank.layout, self.plan), self.cohort)):
                self.encoder.state_dict()[f"bases.{i}"].copy_(basis)
                self.decoder.state_dict()[f"bases.{i}"].copy_(basis)
        return {}

    def _bases(self, blocks: Blocks) -> BufferList:
        """Return the bases: zeros to fit, or random ones from the public seed (those of round 0 if every round has its own)."""
        if self.basis == "pca":
            return BufferList([torch.zeros(group.length, group.code) for group in blocks.groups])
        path: tuple[Part, ...] = (self.seed, "fresh basis", 0) if self.fresh else (self.seed, "random basis")
        return BufferList(random_bases(blocks, *path), persistent=False)


class BufferList(nn.Module):
    """A list of buffers: tensors that are moved (and, if persistent, saved) with a module but not trained."""

    def __init__(self, tensors: list[Tensor], persistent: bool = True) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor, persistent=persistent)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._buffers[name] for name in self._buffers)  # type: ignore[misc]
