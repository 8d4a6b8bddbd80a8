"""Orthonormal factors in few bits: what a two-sided encoder weighs on the wire."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.core.wire import pack_integers, unpack_integers

Shape = tuple[int, int]


class Factors(nn.Module):
    """Matrices ``[n, r]`` with orthonormal columns, kept as integers of ``bits`` bits and one float16 scale a column.

    Rounding bends the columns a little, so whoever reads them makes them orthonormal again (QR, in their order): encoder and decoder
    do it to the same integers and compute with the same factors.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, shapes: list[Shape], bits: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.bits = bits
        self._bases: list[Tensor] = [torch.zeros(shape) for shape in shapes]
        self.register_buffer("packed", torch.zeros(factor_bytes(shapes, bits) - 2 * sum(r for _, r in shapes), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(sum(r for _, r in shapes), dtype=torch.float16))
        self.register_load_state_dict_post_hook(lambda module, _: module._read())  # type: ignore[no-untyped-call]

    def write(self, bases: list[Tensor]) -> None:
        """Take over matrices ``[n, r]`` of these shapes."""
        if not bases:
            return
        limit = (1 << (self.bits - 1)) - 1
        scale = torch.cat([basis.abs().amax(0) / limit for basis in bases]).clamp(min=1e-6).half()
        pieces = torch.split(scale.float(), [r for _, r in self.shapes])
        whole = [(basis / piece).round_().clamp_(-limit, limit).flatten() for basis, piece in zip(bases, pieces, strict=True)]
        packed = pack_integers(torch.cat(whole).to(torch.int32).cpu().numpy(), self.bits)
        self.scale.copy_(scale)
        self.packed.copy_(torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy()))
        self._read()

    def bases(self, device: torch.device) -> list[Tensor]:
        """Return the matrices ``[n, r]``, orthonormal, on a device."""
        if self._bases and self._bases[0].device != device:
            self._bases = [basis.to(device) for basis in self._bases]
        return self._bases

    def _read(self) -> None:
        count = sum(n * r for n, r in self.shapes)
        whole = torch.from_numpy(unpack_integers(self.packed.cpu().numpy().tobytes(), self.bits, count)).float()
        columns = torch.split(self.scale.cpu().float(), [r for _, r in self.shapes])
        pieces = torch.split(whole, [n * r for n, r in self.shapes])
        self._bases = [orthonormal(p.view(shape) * c) for p, c, shape in zip(pieces, columns, self.shapes, strict=True)]


def factor_bytes(shapes: list[Shape], bits: int) -> int:
    """Return the bytes of matrices ``[n, r]`` at so many bits an entry and a float16 a column."""
    return (sum(n * r for n, r in shapes) * bits + 7) // 8 + 2 * sum(r for _, r in shapes)


def orthonormal(matrix: Tensor) -> Tensor:
    """Return the matrix ``[n, r]`` with its columns made orthonormal one after another, each keeping its direction as far as it can."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    fixed: Tensor = q * signs
    return fixed
