"""Sums that a few malicious clients cannot move at will, in code space: a bound on every code's norm, a trimmed mean, a median.

They need to see every code, so they exclude secure aggregation; trimmed mean and median also hold the whole cohort's codes at once,
an exception to the law that the server holds one sum. Codes are what clients send, before decoding: for a linear codec, outliers among
codes are outliers among what the updates are decoded to.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fedlight.aggregation.base import Aggregator, Setting
from fedlight.core.codec import Decoder
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.rounds import Round, Upload
from fedlight.core.running_sum import RunningSum


def bound_norm(code: Tensor, bound: float) -> Tensor:
    """Return a code ``[n]`` scaled to L2 norm ``bound`` where it is longer, as float64 (Sun et al. 2019, arXiv 1911.07963, section 4)."""
    code = code.double()
    length = float(code.norm())
    return code * (bound / length) if length > bound else code


def trimmed_mean(codes: Tensor, share: float) -> Tensor:
    """Return the mean ``[n]`` of ``codes`` ``[clients, n]`` without the largest and smallest ``share`` of every coordinate.

    Yin et al. 2018, arXiv 1803.01498, Definition 2; a share of clients is rounded down, and at least one is left.
    """
    cut = min(int(share * len(codes)), (len(codes) - 1) // 2)
    return codes.double().sort(0).values[cut : len(codes) - cut].mean(0)


def median(codes: Tensor) -> Tensor:
    """Return the median ``[n]`` of every coordinate of ``codes`` ``[clients, n]``, between the middle two of an even number.

    Yin et al. 2018, arXiv 1803.01498, Definition 1.
    """
    ordered, count = codes.double().sort(0).values, len(codes)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


class NormBound(Aggregator):
    """Adds up codes whose norm is bounded: what is longer is scaled down, so that no client weighs more than any other may.

    Args:
        bound: Largest L2 norm of a code, in the units of the float code (for an orthonormal codec those of the update).

    Raises:
        ConfigurationError: if the bound is not positive, or codes have no common unit.
    """

    def __init__(self, bound: float) -> None:
        if bound <= 0:
            raise ConfigurationError(f"Expected `bound` > 0 but got {bound}")
        self.bound = bound

    def arrive(self, round: Round, upload: Upload, decoder: Decoder, device: torch.device) -> Tensor | None:
        """Add one client's bounded code to the running sum."""
        code = decoder.read_message(upload.message, round.public, device)
        unit = decoder.unit(round.public)
        if unit is None:
            raise MessageError("Expected codes of one common step to bound their norm but coefficients have steps of their own")
        round.codes.add(bound_norm(code, self.bound / unit), upload.weight)
        return code


class _AllCodes(Aggregator):
    """Keeps every code of the cohort and puts a location of them in the place of their mean."""

    sums = False

    def __init__(self) -> None:
        self._codes: list[tuple[int, Tensor]] = []

    def check(self, setting: Setting) -> None:
        """Refuse weights, which these rules do not know, and several processes, of which none sees all codes."""
        name = type(self).__name__
        if setting.largest_weight > 1:
            raise ConfigurationError(f"Expected `model.weighting` equal for {name}, which counts clients alike, but got weights")
        if setting.processes > 1:
            raise ConfigurationError(
                f"Expected one process for {name}, which has to see all codes, but got {setting.processes}: set `trainer.devices` to 1"
            )

    def open(self, round: Round, codec: object, weights: Tensor) -> None:
        """Forget the codes of the attempt before."""
        self._codes = []

    def arrive(self, round: Round, upload: Upload, decoder: Decoder, device: torch.device) -> Tensor | None:
        """Keep one client's code."""
        code = decoder.read_message(upload.message, round.public, device)
        self._codes.append((upload.client, code))
        return code

    def close(self, round: Round, device: torch.device) -> None:
        """Leave the location, times the number of clients, for a sum."""
        codes, self._codes = self._codes, []
        if not codes:
            return
        total = RunningSum()
        for _ in codes:
            total.add(torch.zeros(()))
        located = self.locate(torch.stack([code for _, code in sorted(codes, key=lambda item: item[0])]))
        total.total = located * len(codes)
        round.codes = total

    @abstractmethod
    def locate(self, codes: Tensor) -> Tensor:
        """Return where the codes ``[clients, n]`` lie, ``[n]``."""


class TrimmedMean(_AllCodes):
    """The mean of every coordinate without its extremes: withstands fewer than ``share`` of malicious clients.

    Args:
        share: Share of the clients that is cut off at either end, below one half.

    Raises:
        ConfigurationError: if the share is out of range, or (before training) clients have weights or several processes run them.
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        if not 0 <= share < 0.5:
            raise ConfigurationError(f"Expected `share` in [0, 0.5) but got {share}")
        self.share = share

    def locate(self, codes: Tensor) -> Tensor:
        """Return the trimmed mean."""
        return trimmed_mean(codes, self.share)


class Median(_AllCodes):
    """The median of every coordinate: withstands fewer than half of malicious clients.

    Raises:
        ConfigurationError: if (before training) clients have weights or several processes run them.
    """

    def locate(self, codes: Tensor) -> Tensor:
        """Return the median."""
        return median(codes)
