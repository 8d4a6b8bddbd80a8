"""Sources of noise: the operating system's random bytes, or a seed if a run is declared a simulation.

Noise that protects somebody must not be predictable, so nothing here falls back to a seed. Seeded noise is for repeatable experiments:
whoever knows the seed can remove the noise.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from fedlight.core.errors import ConfigurationError
from fedlight.core.random import Part, numpy_generator


class NoiseSource(ABC):
    """Draws Gaussian noise, continuous or on the integers."""

    @abstractmethod
    def uniform(self, count: int) -> np.ndarray:
        """Return numbers ``[count]`` in (0, 1), multiples of 2^-53 shifted by half of it."""

    @abstractmethod
    def discrete(self, count: int, deviation: float) -> np.ndarray:
        """Return integers ``[count]`` (int64) with ``P(k)`` proportional to ``exp(-k^2 / (2 deviation^2))``."""

    def gaussian(self, count: int, deviation: float) -> np.ndarray:
        """Return normal numbers ``[count]`` (float64) by Box and Muller's transform."""
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * math.pi * self.uniform(half)
        return deviation * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class SystemNoise(NoiseSource):
    """Noise from the operating system's generator; integers by OpenDP's exact sampler (Canonne, Kamath & Steinke 2020, arXiv 2004.00010).

    Raises:
        ConfigurationError: when integers are drawn, if OpenDP is not installed.
    """

    def uniform(self, count: int) -> np.ndarray:
        """Return numbers ``[count]`` in (0, 1)."""
        return _to_uniform(np.frombuffer(os.urandom(8 * count), dtype="<u8"))

    def discrete(self, count: int, deviation: float) -> np.ndarray:
        """Return discrete Gaussian integers ``[count]``."""
        return np.array(_opendp_sampler(deviation)([0] * count), dtype=np.int64)


class SeededNoise(NoiseSource):
    """Noise determined by a path of names and numbers: for repeatable simulations, it protects nobody.

    Integers come from a table of their probabilities, in double precision.

    Args:
        path: name of the stream, see ``fedlight.core.random.derive_seed``.
    """

    def __init__(self, *path: Part) -> None:
        self.generator = numpy_generator(*path)

    def uniform(self, count: int) -> np.ndarray:
        """Return numbers ``[count]`` in (0, 1)."""
        return _to_uniform(self.generator.integers(0, 1 << 64, size=count, dtype=np.uint64))

    def discrete(self, count: int, deviation: float) -> np.ndarray:
        """Return discrete Gaussian integers ``[count]``."""
        table, last = _cumulative(deviation)
        return np.searchsorted(table, self.uniform(count)).astype(np.int64) - last


def _to_uniform(words: np.ndarray) -> np.ndarray:
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@lru_cache(maxsize=8)
def _cumulative(deviation: float) -> tuple[np.ndarray, int]:
    """Return the distribution function at ``-last .. last``, and ``last``, beyond which double precision has nothing left."""
    last = math.ceil(12 * deviation)
    weights = np.exp(-0.5 * (np.arange(-last, last + 1) / deviation) ** 2)
    table = weights.cumsum() / weights.sum()
    table[-1] = 1.0
    return table, last


@lru_cache(maxsize=8)
def _opendp_sampler(deviation: float) -> Any:
    opendp = import_extra("opendp.prelude")
    opendp.enable_features("contrib")
    integers = opendp.vector_domain(opendp.atom_domain(T="i64"))
    return opendp.m.make_gaussian(integers, opendp.l2_distance(T="f64"), deviation)


def import_extra(module: str) -> Any:
    """Return a module of the optional dependencies ``privacy``; raises ``ConfigurationError`` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"Expected {module.split('.')[0]!r} to be installed, which differential privacy needs, but it is not: "
            "pip install 'fedlight[privacy]'"
        ) from error
