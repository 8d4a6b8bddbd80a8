"""PowerSGD: one step of power iteration on the mean update of every weight matrix, in two passes.

Vogels, Karimireddy & Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (arXiv
1905.13727), Algorithms 1 and 2. For each matrix M_i of client i, plus what earlier rounds left out::

    pass 0:  P_i = M_i Q        the server broadcasts P = orthonormal(mean_i P_i)
    pass 1:  Q_i = M_i^T P      the server decodes P Q^T with Q = mean_i Q_i;  e_i <- M_i - P Q_i^T
    the next round starts with Q
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedlight.core.codec import Codec, CodecPart, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.errors import require
from fedlight.core.layout import Layout
from fedlight.core.linalg import qr
from fedlight.core.random import torch_generator
from fedlight.core.wire import CodeFormat, Format


@dataclass(frozen=True)
class LowRank:
    """The low-rank tensors of a layout; vectors, and matrices that two factors do not make smaller, are sent in full."""

    layout: Layout
    rank: int

    @cached_property
    def matrices(self) -> dict[int, tuple[int, int, int]]:
        """Rows, columns and sent directions of the low-rank tensors, by place; convolutions ``[out, ...]`` are matrices of ``out`` rows."""
        found = {}
        for index, (shape, size) in enumerate(zip(self.layout.shapes, self.layout.sizes, strict=True)):
            if len(shape) > 1 and size:
                rows, columns = shape[0], size // shape[0]
                if (r := min(self.rank, rows, columns)) * (rows + columns) < rows * columns:
                    found[index] = rows, columns, r
        return found

    @property
    def left_length(self) -> int:
        """Total numbers in all P."""
        return sum(rows * r for rows, _, r in self.matrices.values())

    @property
    def right_length(self) -> int:
        """Total numbers in all Q."""
        return sum(columns * r for _, columns, r in self.matrices.values())

    @cached_property
    def rest(self) -> dict[int, int]:
        """The sizes of the tensors that are sent in full, by place."""
        return {index: size for index, size in enumerate(self.layout.sizes) if index not in self.matrices}

    @property
    def rest_length(self) -> int:
        """Total numbers in the tensors that are sent in full."""
        return sum(self.rest.values())

    def cut(self, update: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the matrices ``[..., rows, columns]`` and the rest ``[..., rest_length]`` of updates ``[..., dim]``."""
        tensors = torch.split(update, list(self.layout.sizes), dim=-1)
        matrices = [tensors[i].reshape(*update.shape[:-1], rows, columns) for i, (rows, columns, _) in self.matrices.items()]
        return matrices, torch.cat([update[..., :0], *(tensors[i] for i in self.rest)], dim=-1)

    def join(self, matrices: list[Tensor], rest: Tensor) -> Tensor:
        """Return the updates ``[..., dim]``: the inverse of ``cut``."""
        found = {i: matrix.flatten(-2) for i, matrix in zip(self.matrices, matrices, strict=True)}
        found.update(zip(self.rest, torch.split(rest, list(self.rest.values()), dim=-1), strict=True))
        return torch.cat([found[i] for i in range(len(found))], dim=-1)

    def lefts(self, flat: Tensor) -> list[Tensor]:
        """View ``[..., left_length]`` as one P ``[..., rows, rank]`` per matrix."""
        return _views(flat, [(rows, r) for rows, _, r in self.matrices.values()])

    def rights(self, flat: Tensor) -> list[Tensor]:
        """View ``[..., right_length]`` as one Q ``[..., columns, rank]`` per matrix."""
        return _views(flat, [(columns, r) for _, columns, r in self.matrices.values()])

    def start(self, seed: int, round: int) -> Tensor:
        """Return a random Q for every matrix ``[right_length]``, from public seeds."""
        return torch.randn(self.right_length, generator=torch_generator(seed, "PowerSGD", round))


def orthonormal(factor: Tensor) -> Tensor:
    """Return orthonormal columns that span those of ``factor`` ``[..., n, rank]``; zero columns become arbitrary orthonormal ones."""
    # In float64, where no float32 magnitude overflows or vanishes.
    return qr(factor.double())[0].to(factor.dtype)


def _views(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    parts = torch.split(flat, [n * r for n, r in shapes], dim=-1)
    return [part.reshape(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(factors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like[..., :0], *(factor.flatten(-2) for factor in factors)], dim=-1)


class PowerSGDHalf(CodecPart):
    """What encoder and decoder know: the low-rank view, and a format for each pass."""

    def __init__(self, view: LowRank) -> None:
        super().__init__(view.layout, CodeFormat(view.left_length + view.rest_length))
        self.view = view

    def format_at(self, step: int) -> Format:
        """Return the format of P and the rest in pass 0, of Q in pass 1."""
        return self.format if step == 0 else CodeFormat(self.view.right_length)


class PowerSGDEncoder(PowerSGDHalf, Encoder):
    """Multiplies the client's matrices by the factor in the broadcast."""

    def __init__(self, view: LowRank, seed: int, feedback: bool) -> None:
        super().__init__(view)
        self.seed = seed
        self.feedback = feedback

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return P_i and the rest ``[..., left_length + rest_length]`` in pass 0, Q_i ``[..., right_length]`` in pass 1.

        ``private.state`` keeps, after pass 1, what P Q_i^T leaves out.
        """
        if self.feedback and "error" in private.state:
            limit = torch.finfo(update.dtype).max
            update = (update + private.state["error"].to(update)).clamp(-limit, limit)
        matrices, rest = self.view.cut(update)
        if context.step == 0:
            right = context.broadcast.get("right")
            rights = self.view.rights((self.view.start(self.seed, context.round) if right is None else right).to(update))
            return torch.cat([_flat([m @ q for m, q in zip(matrices, rights, strict=True)], update), rest], dim=-1)
        lefts = self.view.lefts(context.broadcast["reply"].to(update))
        rights = [m.mT @ p for m, p in zip(matrices, lefts, strict=True)]
        if self.feedback:
            missed = [m - p @ q.mT for m, p, q in zip(matrices, lefts, rights, strict=True)]
            # On the CPU, because it outlives this round's device.
            private.state["error"] = self.view.join(missed, torch.zeros_like(rest)).cpu()
        return _flat(rights, update)


class PowerSGDDecoder(PowerSGDHalf, Decoder):
    """Orthonormalises the mean P between the passes, and multiplies the factors after them."""

    def __init__(self, view: LowRank, warm_start: bool) -> None:
        super().__init__(view)
        self.warm_start = warm_start

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the orthonormal P ``[..., left_length]`` after pass 0, the aggregated update ``[..., dim]`` after pass 1."""
        if context.step == 0:
            state.pop("right", None)  # every client has it already
            left, state["rest"] = torch.split(mean_code, [self.view.left_length, self.view.rest_length], dim=-1)
            return _flat([orthonormal(p) for p in self.view.lefts(left)], left)
        lefts = self.view.lefts(context.broadcast["reply"].to(mean_code).reshape(*mean_code.shape[:-1], self.view.left_length))
        rights = self.view.rights(mean_code)
        if self.warm_start:
            # Only the span of Q matters for the next P; orthonormal columns give P the magnitude of the update.
            state["right"] = _flat([orthonormal(q) for q in rights], mean_code)
        return self.view.join([p @ q.mT for p, q in zip(lefts, rights, strict=True)], state.pop("rest"))

    def broadcast(self, state: State) -> State:
        """Return the round's initial Q, unless clients can draw it."""
        return {"right": state["right"]} if "right" in state else {}


class PowerSGDCodec(Codec):
    """Approximates the mean update of every weight matrix by `rank` directions, found by one power iteration per round.

    Clients send two messages per round, and the server broadcasts twice: Q before the first pass (with `warm_start`, and not in round 0,
    whose Q comes from the seed), the orthonormal P before the second. Vectors, and matrices that the factors would not make smaller, are
    sent uncompressed in the first pass. Codes add up; decoding is not linear.

    Args:
        rank: directions of each matrix.
        warm_start: whether a round starts with the final Q of the last one; else with a random one, which takes no download.
        feedback: whether a client adds what its last message left out to its next update (error feedback, Algorithm 2); if clients
            rarely take part, they send outdated errors.
        seed: seed of the first Q.
    """

    passes = 2

    def __init__(self, rank: int = 2, warm_start: bool = True, feedback: bool = True, seed: int = 0) -> None:
        require(rank >= 1, f"Expected `rank` >= 1 but got {rank}")
        self.rank = rank
        self.warm_start = warm_start
        self.feedback = feedback
        self.seed = seed
        self.client_state = feedback

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        return PowerSGDEncoder(LowRank(layout, self.rank), self.seed, self.feedback)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        return PowerSGDDecoder(LowRank(layout, self.rank), self.warm_start)
