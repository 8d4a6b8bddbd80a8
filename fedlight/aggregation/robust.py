"""Sums that a few malicious clients cannot move at will, in code space: a bound on every code's norm, a trimmed mean, a median.

They need to see every code, so they exclude secure aggregation; trimmed mean and median also hold the whole cohort's codes at once,
an exception to the law that the server holds one sum. Codes are what clients send, before decoding: for a linear codec, outliers among
codes are outliers among what the updates are decoded to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlight.aggregation.base import AggregationSetting, Aggregator, Collector, PlainCollector
from fedlight.core.codec import Codec, Context, Decoder
from fedlight.core.errors import ConfigurationError
from fedlight.core.model import Model
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import Message


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


class _SeesCodes(Aggregator):
    """What looks at every code, in one process: of several none would see all."""

    def check(self, setting: AggregationSetting) -> None:
        """Refuse several processes, and weights: whoever claimed a large one would count for many."""
        if setting.processes > 1:
            raise ConfigurationError(
                f"Expected one process for {type(self).__name__}, which has to see all codes, but got {setting.processes}: "
                "set `trainer.devices` to 1"
            )
        if setting.largest_weight > 1:
            raise ConfigurationError(
                f"Expected `model.weighting` equal for {type(self).__name__}, which counts clients alike, but got weights"
            )


class NormBound(_SeesCodes):
    """Adds up codes whose norm is bounded: what is longer is scaled down, so that no client weighs more than any other may.

    Args:
        bound: Largest L2 norm of a code, in the units of the float code (for an orthonormal codec those of the update).

    Raises:
        ConfigurationError: if the bound is not positive, or (before training) coefficients have no common step, clients have weights, or
            several processes run them.
    """

    def __init__(self, bound: float) -> None:
        if bound <= 0:
            raise ConfigurationError(f"Expected `bound` > 0 but got {bound}")
        self.bound = bound

    def check(self, setting: AggregationSetting) -> None:
        """Refuse codecs whose coefficients have steps of their own, too."""
        super().check(setting)
        if setting.vectors > 1 or setting.scalars:
            raise ConfigurationError(
                f"Expected clients that upload nothing but the update for NormBound, but those of {setting.algorithm} upload more, of "
                "which no one norm is the bound: set `model.algorithm` to FedAvg or FedProx, or `model.aggregator` to Median"
            )
        if setting.codec.bound and self._unit_of(setting.codec, Context(broadcast=setting.codec.decoder.broadcast({}))) is None:
            raise ConfigurationError(
                f"Expected codes of one common step for NormBound but the coefficients of {type(setting.codec).__name__} have steps of "
                "their own: use TransformCodec, or leave QuantizeCodec out"
            )

    @staticmethod
    def _unit_of(codec: Codec, context: Context) -> float | None:
        return codec.encoder.common_step(context) if codec.additive else 1.0

    def collector(self, context: Context, codec: Codec, cohort: Sequence[int], model: Model, device: torch.device) -> Collector:
        """Return a running sum of bounded codes."""
        bound = self.bound / (self._unit_of(codec, context) or 1.0)
        return PlainCollector(context, codec.decoder, device, lambda code: bound_norm(code, bound))


class AllCodes(PlainCollector):
    """Keeps every code of the cohort, and puts a location of them in the place of their mean.

    ``locate`` maps codes ``[clients, n]`` to where they lie, ``[n]``.
    """

    def __init__(self, context: Context, decoder: Decoder, device: torch.device, locate: Callable[[Tensor], Tensor]) -> None:
        super().__init__(context, decoder, device)
        self.locate = locate
        self._codes: dict[int, Tensor] = {}

    def receive(self, stage: str, client: int, message: Message, weight: int) -> None:
        """Keep one client's code."""
        self._codes[client] = self.decoder.read_message(message, self.context, self.device)

    def finish(self) -> RunningSum:
        """Return the location, times the number of clients, for a sum."""
        total = RunningSum()
        if self._codes:
            count = len(self._codes)
            total.total = self.locate(torch.stack([self._codes[client] for client in sorted(self._codes)])) * count
            total.weight = total.count = total.squares = count
        return total


class _Located(_SeesCodes):
    """An aggregator that locates codes instead of summing them."""

    sums = False

    def collector(self, context: Context, codec: Codec, cohort: Sequence[int], model: Model, device: torch.device) -> Collector:
        """Return what keeps all codes."""
        return AllCodes(context, codec.decoder, device, self.locate)

    @abstractmethod
    def locate(self, codes: Tensor) -> Tensor:
        """Return where the codes ``[clients, n]`` lie, ``[n]``."""


class TrimmedMean(_Located):
    """The mean of every coordinate without its extremes: withstands fewer than ``share`` of malicious clients.

    Args:
        share: Share of the clients that is cut off at either end, below one half.

    Raises:
        ConfigurationError: if the share is out of range, or (before training) clients have weights or several processes run them.
    """

    def __init__(self, share: float = 0.1) -> None:
        if not 0 <= share < 0.5:
            raise ConfigurationError(f"Expected `share` in [0, 0.5) but got {share}")
        self.share = share

    def locate(self, codes: Tensor) -> Tensor:
        """Return the trimmed mean."""
        return trimmed_mean(codes, self.share)


class Median(_Located):
    """The median of every coordinate: withstands fewer than half of malicious clients.

    Raises:
        ConfigurationError: if (before training) clients have weights or several processes run them.
    """

    def locate(self, codes: Tensor) -> Tensor:
        """Return the median."""
        return median(codes)
