"""Orthonormal factors in few bits: the bytes of a two-sided encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.core.linalg import orthonormal
from fedlight.core.wire import pack_integers, unpack_integers

Shape = tuple[int, int]


class Factors(nn.Module):
    """Matrices ``[n, r]`` with orthonormal columns, stored only as integers of ``bits`` bits.

    Every column fills the range of its integers. Rounding bends columns a little, so readers make them orthonormal again (QR, in
    their order), which also removes their lengths. Encoder and decoder do this to the same integers and compute with the same
    factors. The initial columns are the first unit vectors.
    """

    packed: Tensor

    def __init__(self, shapes: list[Shape], bits: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.bits = bits
        self._bases: list[Tensor] = [torch.eye(*shape) for shape in shapes]
        self.register_buffer("packed", self._round(self._bases))
        self.register_load_state_dict_post_hook(_read_again)  # type: ignore[no-untyped-call]

    def write(self, bases: list[Tensor]) -> None:
        """Store matrices ``[n, r]`` of these shapes."""
        self.packed.copy_(self._round(bases))
        self.read()

    def bases(self, device: torch.device) -> list[Tensor]:
        """Return the matrices ``[n, r]``, orthonormal, on a device."""
        if self._bases and self._bases[0].device != device:
            self._bases = [basis.to(device) for basis in self._bases]
        return self._bases

    def read(self) -> None:
        """Compute the matrices from the integers."""
        sizes = [n * r for n, r in self.shapes]
        whole = torch.from_numpy(unpack_integers(self.packed.cpu().numpy().tobytes(), self.bits, sum(sizes))).float()
        self._bases = [orthonormal(piece.view(shape)) for piece, shape in zip(torch.split(whole, sizes), self.shapes, strict=True)]

    def _round(self, bases: list[Tensor]) -> Tensor:
        limit = (1 << (self.bits - 1)) - 1
        largest = [basis.abs().amax(0).clamp(min=1e-30) for basis in bases]
        whole = [(basis / most * limit).round_().flatten() for basis, most in zip(bases, largest, strict=True)]
        packed = pack_integers(torch.cat(whole).to(torch.int32).cpu().numpy() if whole else np.zeros(0, np.int32), self.bits)
        return torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy())


def _read_again(factors: Factors, _: object) -> None:
    factors.read()


def factor_bytes(shapes: list[Shape], bits: int) -> int:
    """Return the bytes of matrices ``[n, r]`` at ``bits`` bits per entry."""
    return (sum(n * r for n, r in shapes) * bits + 7) // 8
