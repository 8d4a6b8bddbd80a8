"""Metrics of a run: bytes, reconstruction and the spread over clients."""

from fedlight.metrics.client_size import accuracy_by_size
from fedlight.metrics.client_spread import ClientSpread
from fedlight.metrics.functional import cosine, explained, relative_error, spread
from fedlight.metrics.reconstruction import ReconstructionError
from fedlight.metrics.traffic import TrafficCounter, format_bytes

__all__ = [
    "ClientSpread",
    "ReconstructionError",
    "TrafficCounter",
    "accuracy_by_size",
    "cosine",
    "explained",
    "format_bytes",
    "relative_error",
    "spread",
]
