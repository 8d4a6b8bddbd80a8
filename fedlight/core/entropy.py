"""Entropy-coded integers: a range coder over Laplacian models whose deviations are public (Martin 1979; Bamler 2022, arXiv 2201.01741).

Every coefficient has a public level, the logarithm of its standard deviation beside the others'. How large all of them are a message says
itself, in its first byte: the one common factor under which it is shortest. So a message is read without anything that was announced.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from fedlight.core.errors import MessageError

LEVELS_PER_OCTAVE = 2
"""A model's deviation is at most 19 % off: that costs .02 bits a coefficient at most, and levels pack well."""

TOP = 38
"""The highest level: models have deviations of 2**-4 to 2**15 steps."""

ONE_STEP = 8
"""The level whose model has a deviation of one step."""

_BITS = 13
_LIMIT = (1 << (_BITS - 1)) - 1
_DEVIATIONS = 2.0 ** ((np.arange(TOP + 1) - ONE_STEP) / LEVELS_PER_OCTAVE)
_DECAY = math.sqrt(2) / _DEVIATIONS
_ZERO, _OTHER = -np.log2(-np.expm1(-_DECAY / 2)), 1 - np.log2(-np.expm1(-_DECAY)) - _DECAY / 2 / math.log(2)
_SHIFTS = np.arange(-TOP, TOP + 1)

_PRECISION = 24
"""Bits of a model's chances, as the coder has them."""

_PIECE = 4096
"""How many entries are read by a short table at a time: fewer cost more calls, of more some entry is too large more often."""

_NEAR = 16
"""A short table has the integers within so many deviations."""

_WIDEST = 512
"""The largest integer of a short table: wider ones are hardly faster than the whole."""


@dataclass(frozen=True)
class EntropyFormat:
    """How integers ``[length]`` of public ``levels`` (a byte each, 0 to ``TOP``) lie on the wire: in about as many bytes as they tell.

    A payload is a byte for the common factor, a check byte, and 32-bit words of the range coder, level by level.

    Attributes:
        bits: bits of the largest integer; a coefficient takes fewer, or up to 24 where its model is far off.
        fixed_width: whether all payloads have the same bytes.
    """

    levels: bytes
    bits: ClassVar[int] = _BITS
    kind: ClassVar[int] = 254
    fixed_width: ClassVar[bool] = False

    @property
    def length(self) -> int:
        """Number of entries."""
        return len(self.levels)

    @property
    def limit(self) -> int:
        """Largest magnitude of an entry."""
        return _LIMIT

    @property
    def parts(self) -> tuple[EntropyFormat]:
        """All of it has one range."""
        return (self,)

    @property
    def payload_bytes(self) -> int:
        """Most bytes of ``pack``'s result: every entry at the least probability that a model has, 2**-24."""
        return 2 + 4 * (-(-24 * self.length // 32) + 2)

    def pack(self, code: Tensor) -> bytes:
        """Return the bytes of an integer code ``[length]``: as many as it takes.

        Raises:
            MessageError: if the code has another length, or an entry is no integer within the limit.
        """
        if code.shape != (self.length,):
            raise MessageError(f"Expected a code of shape [{self.length}] but got {list(code.shape)}")
        if code.is_floating_point():
            raise MessageError(f"Expected an integer code for an entropy-coded format but got {code.dtype}: round it first")
        values = code.detach().cpu().numpy()
        if (beyond := (values > self.limit) | (values < -self.limit)).any():
            raise MessageError(f"Expected integers within +-{self.limit} but the one at coordinate {int(beyond.argmax())} is larger")
        values = values[self._order].astype(np.int32, copy=False)
        return self._encode(values + np.int32(_LIMIT), int(_SHIFTS[self._bits(values).argmin()]))

    def unpack(self, payload: bytes | memoryview) -> Tensor:
        """Return the code ``[length]`` (int32) that ``pack`` wrote.

        Whatever ``pack`` would not write is refused: a payload cut short or followed by more, and nearly every one that was damaged
        (what follows a changed byte is another code of another length, and the check byte is another).

        Raises:
            MessageError: if the payload is no such code's.
        """
        if not 2 <= len(payload) <= self.payload_bytes or len(payload) % 4 != 2 or payload[0] >= len(_SHIFTS):
            raise MessageError(
                f"Expected an entropy-coded payload of 2 bytes and whole words, {self.payload_bytes} bytes at most, but got {len(payload)} "
                f"that begin with {bytes(payload[:1]).hex() or 'nothing'}"
            )
        shift = int(_SHIFTS[payload[0]])
        decoder, parts = stream.queue.RangeDecoder(np.frombuffer(payload[2:], "<u4").astype(np.uint32)), []
        try:
            for index, count in self._models(shift):
                for start in range(0, count, _PIECE):
                    part, decoder = _decode(decoder, index, min(_PIECE, count - start))
                    parts.append(part)
        except AssertionError as error:
            raise MessageError(f"Expected an entropy-coded payload but could not decode it: {error}") from error
        symbols = np.concatenate([np.zeros(0, np.int32), *parts])
        if self._encode(symbols, shift) != payload:
            raise MessageError("Expected an entropy-coded payload of one code and nothing else but got more or less than that")
        code = np.empty_like(symbols)
        code[self._order] = symbols - np.int32(_LIMIT)
        return torch.from_numpy(code)

    def ideal_bytes(self, code: Tensor) -> float:
        """Return what the models give a code ``[length]``: its information in bytes, the first two included."""
        return 2 + float(self._bits(code.detach().cpu().numpy()[self._order]).min()) / 8

    @cached_property
    def _order(self) -> np.ndarray:
        """Where the entries of every level lie, ``[length]``."""
        return np.frombuffer(self.levels, np.uint8).argsort(kind="stable")

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The levels there are and how many entries each has."""
        return np.unique(np.frombuffer(self.levels, np.uint8), return_counts=True)

    def _models(self, shift: int) -> list[tuple[int, int]]:
        """Return (model, entries) of every run."""
        levels, counts = self._runs
        return list(zip(np.clip(levels.astype(int) + shift, 0, TOP).tolist(), counts.tolist(), strict=True))

    def _bits(self, values: np.ndarray) -> np.ndarray:
        """Return the information of ordered values ``[length]`` under every common factor, ``[shifts]``."""
        levels, counts = self._runs
        starts = np.cumsum(counts) - counts
        others, sums = (np.add.reduceat(each, starts, dtype=np.int64) for each in (values != 0, np.abs(values)))
        models = np.clip(levels.astype(int) + _SHIFTS[:, None], 0, TOP)
        costs = (counts - others) * _ZERO[models] + others * _OTHER[models] + sums * _DECAY[models] / math.log(2)
        total: np.ndarray = costs.sum(1)
        return total

    def _encode(self, symbols: np.ndarray, shift: int) -> bytes:
        """Return the payload of ordered symbols ``[length]``, values plus the limit, under a common factor."""
        encoder, start = stream.queue.RangeEncoder(), 0
        for index, count in self._models(shift):
            encoder.encode(symbols[start : start + count], _model(index))
            start += count
        words: bytes = encoder.get_compressed().astype("<u4").tobytes()
        return bytes([shift + TOP, zlib.crc32(words) & 0xFF]) + words


def _decode(decoder: stream.queue.RangeDecoder, index: int, count: int) -> tuple[np.ndarray, stream.queue.RangeDecoder]:
    """Return the next symbols ``[count]``, all of one level, and the decoder behind them.

    Most of the time goes into the search of the table, so a full piece is read by a short one: that tells where an integer beyond it was
    met, but not which, and the piece is read again by the whole table.
    """
    near = math.ceil(_NEAR * _DEVIATIONS[index])
    if count == _PIECE and near <= _WIDEST:
        ahead = decoder.clone()
        try:
            found = ahead.decode(_model(index, near), count)
        except AssertionError:  # as what follows an integer beyond the table can do
            found = np.zeros(1, np.int32)
        if found.min() > 0 and found.max() <= 2 * near + 1:
            return found + np.int32(_LIMIT - near - 1), ahead
    return decoder.decode(_model(index), count), decoder


@cache
def _model(index: int, near: int = _LIMIT) -> stream.model.Categorical:
    """Return the model of a level: integers from minus to plus ``near``, between all smaller and all larger ones where there are any.

    A table is decoded four times faster than a function, and its chances are rounded: the same on machines whose exponentials are not.
    The coder takes off one part in 2**24 of every symbol's chance, and shares out the rest as it is told.
    """
    bounds = _bounds(index)
    if near < _LIMIT:
        bounds = np.concatenate([bounds[:1], bounds[_LIMIT - near : _LIMIT + near + 2], bounds[-1:]])
    return stream.model.Categorical(np.diff(bounds) - 1.0, perfect=False)


@cache
def _bounds(index: int) -> np.ndarray:
    """Return where the chances of the integers from minus to plus the limit begin and end, of 2**24: each has at least one part."""
    decay, sizes = _DECAY[index], np.abs(np.arange(-_LIMIT, _LIMIT + 1))
    chances = np.where(sizes, np.exp(-decay * (sizes - 0.5)) * -np.expm1(-decay) / 2, -np.expm1(-decay / 2))
    sums = np.cumsum(np.concatenate([[0.0], np.rint(chances * 2**30)]))
    spare = (1 << _PRECISION) - len(sizes)
    bounds: np.ndarray = (sums * (spare / sums[-1])).astype(np.int64) + np.arange(len(sums))
    bounds[-1] = 1 << _PRECISION
    return bounds
