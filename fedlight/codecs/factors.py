"""Orthonormal factors in few bits: the bytes of a two-sided encoder."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.core.entropy import LEVELS_PER_OCTAVE, ONE_STEP, TOP, EntropyFormat
from fedlight.core.errors import MessageError
from fedlight.core.linalg import orthonormal
from fedlight.core.wire import pack_integers, unpack_integers

Shape = tuple[int, int]


class Factors(nn.Module):
    """Matrices ``[n, r]`` with orthonormal columns, stored only as integers of ``bits`` bits.

    Every column fills the range of its integers. Rounding bends columns a little, so readers make them orthonormal again (QR, in
    their order), which also removes their lengths. Encoder and decoder do this to the same integers and compute with the same
    factors. The initial columns are the first unit vectors.

    With ``coded`` bytes the integers are those of ``code_columns`` instead, and there are no factors before they are loaded.
    """

    packed: Tensor

    def __init__(self, shapes: list[Shape], bits: float, coded: int = 0) -> None:
        super().__init__()
        self.shapes = shapes
        self.bits = bits
        self.coded = coded
        self._bases: list[Tensor] = [torch.eye(*shape) for shape in shapes]
        self.register_buffer("packed", torch.zeros(coded, dtype=torch.uint8) if coded else self._round(self._bases))
        self.register_load_state_dict_post_hook(_read_again)  # type: ignore[no-untyped-call]

    def write(self, bases: list[Tensor]) -> None:
        """Store matrices ``[n, r]`` of these shapes."""
        self.packed.copy_(self._round(bases))
        self.read()

    def load(self, packed: bytes) -> None:
        """Store what ``code_columns`` made of matrices of these shapes."""
        self.packed.copy_(_as_tensor(packed))
        self.read()

    def bases(self, device: torch.device) -> list[Tensor]:
        """Return the matrices ``[n, r]``, orthonormal, on a device."""
        if self._bases and self._bases[0].device != device:
            self._bases = [basis.to(device) for basis in self._bases]
        return self._bases

    def read(self) -> None:
        """Compute the matrices from the integers."""
        packed, sizes = self.packed.cpu().numpy().tobytes(), [n * r for n, r in self.shapes]
        whole = decode_columns(packed, self.shapes) if self.coded else unpack_integers(packed, self._width, sum(sizes))
        pieces = torch.split(torch.from_numpy(whole).float(), sizes)
        self._bases = [orthonormal(piece.view(shape)) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def _round(self, bases: list[Tensor]) -> Tensor:
        limit = (1 << (self._width - 1)) - 1
        largest = [basis.abs().amax(0).clamp(min=1e-30) for basis in bases]
        whole = [(basis / most * limit).round_().flatten() for basis, most in zip(bases, largest, strict=True)]
        return _as_tensor(pack_integers(torch.cat(whole).to(torch.int32).cpu().numpy() if whole else np.zeros(0, np.int32), self._width))

    @property
    def _width(self) -> int:
        """Bits of integers of one width: a whole number of them."""
        return math.ceil(self.bits)


def _as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _read_again(factors: Factors, _: object) -> None:
    factors.read()


def factor_bytes(shapes: list[Shape], bits: float) -> int:
    """Return the bytes of matrices ``[n, r]`` at ``bits`` bits per entry."""
    return math.ceil(sum(n * r for n, r in shapes) * bits / 8)


def code_columns(bases: list[Tensor], worth: list[Tensor], bits: float) -> bytes:
    """Return matrices ``[n, r]`` with orthonormal columns as bytes: about ``bits`` bits an entry, more where a column is ``worth`` more.

    A column's rounding takes away from what it is worth ``[r]`` (the energy that it carries) in proportion, so the step of its entries
    goes with the inverse root of that: reverse water-filling over columns. Entries are entropy-coded; before them comes a byte a column.
    """
    lengths = torch.cat([torch.full((basis.shape[1],), float(len(basis))) for basis in bases]) if bases else torch.zeros(0)
    if not len(lengths):
        return b""
    value = torch.cat(worth).float()
    rates = _water_fill(value.clamp(min=1e-9 * float(value.max().clamp(min=1e-30))).log2() / 2, lengths, bits)
    # A Gaussian of this deviation takes `rate` bits at a step of sqrt(2 pi e) deviations over 2**rate; the largest entry is 1 in all.
    finest = torch.log2(lengths.sqrt() / EntropyFormat(b"").limit)
    steps = (LEVELS_PER_OCTAVE * torch.maximum(math.log2(2 * math.pi * math.e) / 2 - rates, finest)).ceil()
    levels = (ONE_STEP - steps).clamp(0, TOP).to(torch.uint8)
    values, entries, start = [], [], 0
    for basis in bases:
        own = levels[start : start + basis.shape[1]]
        start += basis.shape[1]
        values.append(_round_columns(basis.cpu() * len(basis) ** 0.5 * 2.0 ** ((own.float() - ONE_STEP) / LEVELS_PER_OCTAVE)).flatten())
        entries.append(own.expand(basis.shape).flatten())
    coder = EntropyFormat(torch.cat(entries).numpy().tobytes())
    return levels.numpy().tobytes() + coder.pack(torch.cat(values).to(torch.int32))


def _round_columns(scaled: Tensor) -> Tensor:
    """Return a matrix ``[n, r]`` rounded to whole numbers, but no column to zeros alone: it keeps its largest entry's sign."""
    whole = scaled.round()
    largest = scaled.abs().argmax(0, keepdim=True)
    signs = torch.where(scaled.gather(0, largest) < 0, -1.0, 1.0)
    return whole.scatter(0, largest, torch.where((whole == 0).all(0, keepdim=True), signs, whole.gather(0, largest)))


def decode_columns(data: bytes, shapes: list[Shape]) -> np.ndarray:
    """Return the integers (int32), flattened, that ``code_columns`` wrote of matrices of these shapes.

    Raises:
        MessageError: if the bytes are not of such matrices.
    """
    count = sum(r for _, r in shapes)
    levels, entries, start = np.frombuffer(data[:count], np.uint8), [], 0
    for n, r in shapes:
        entries.append(np.tile(levels[start : start + r], n))
        start += r
    if len(levels) != count or (levels > TOP).any():
        raise MessageError(f"Expected factors of {count} columns but the data has {len(data)} bytes, or levels beyond {TOP}")
    return EntropyFormat(np.concatenate([np.zeros(0, np.uint8), *entries]).tobytes()).unpack(data[count:]).numpy()


def _water_fill(rates: Tensor, lengths: Tensor, mean: float) -> Tensor:
    """Return rates ``[n]`` shifted by one number so that, cut to 1 to 9 bits, their mean over entries is ``mean``."""
    low, high = -64.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        over = float((lengths * (rates + middle).clamp(1, 9)).sum() / lengths.sum()) > mean
        low, high = (low, middle) if over else (middle, high)
    return (rates + low).clamp(1, 9)
