"""What a run is measured by: bytes, reconstruction and the spread over clients.

What needs TorchMetrics is imported when it is asked for: counting bytes needs none.
"""

from typing import TYPE_CHECKING

from fedlight.core.figures import format_bytes
from fedlight.core.lazy import import_on_demand
from fedlight.metrics.functional import accuracy_by_size, cosine, explained, relative_error, spread
from fedlight.metrics.traffic import TrafficCounter

if TYPE_CHECKING:
    from fedlight.metrics.client_spread import ClientSpread
    from fedlight.metrics.reconstruction import ReconstructionError

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

__getattr__, __dir__ = import_on_demand(
    __name__, {"ClientSpread": "fedlight.metrics.client_spread", "ReconstructionError": "fedlight.metrics.reconstruction"}
)
