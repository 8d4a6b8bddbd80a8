"""Bytes in both directions, counted from the messages sent (law 6) and exact at any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from operator import index

from fedlight.core.errors import require


@dataclass
class TrafficCounter:
    """Bytes sent since the run began, as Python integers: a float would lose bytes beyond 2^53.

    What is counted must not be negative: each method raises ``ConfigurationError`` if it is.

    Args:
        uplink: bytes from clients, including handshakes.
        downlink: bytes to clients, including encoders and handshakes.
        codec: the encoders' part of ``downlink``.
        messages: number of messages in ``uplink``.
        handshake_up: keys, shares and signatures of secure aggregation in ``uplink``.
        handshake_down: those in ``downlink``.

    >>> traffic = TrafficCounter()
    >>> traffic.add_message(116)
    >>> traffic.add_download(4_000)
    >>> traffic.add_codec(1_000)
    >>> traffic.uplink, traffic.downlink, traffic.codec, round(traffic.ratio(1_000), 1)
    (116, 5000, 1000, 34.5)
    """

    uplink: int = 0
    downlink: int = 0
    codec: int = 0
    messages: int = 0
    handshake_up: int = 0
    handshake_down: int = 0

    def add_message(self, n_bytes: int, messages: int = 1) -> None:
        """Count one client's message of ``n_bytes``, or several messages of ``n_bytes`` in total."""
        self.uplink += _count(n_bytes)
        self.messages += _count(messages)

    def add_download(self, n_bytes: int) -> None:
        """Count ``n_bytes`` sent to a client that are not an encoder: the model, the masks, the codec's broadcast."""
        self.downlink += _count(n_bytes)

    def add_codec(self, n_bytes: int) -> None:
        """Count an encoder of ``n_bytes`` sent to a client, as ``codec`` and as part of ``downlink``."""
        self.add_download(n_bytes)
        self.codec += _count(n_bytes)

    def add_handshake(self, up: int, down: int) -> None:
        """Count what secure aggregation sends in addition to masked codes, in both directions."""
        up, down = _count(up), _count(down)
        self.uplink += up
        self.downlink += down
        self.handshake_up += up
        self.handshake_down += down

    @property
    def mean_message(self) -> float:
        """Mean bytes of a message (masked codes with headroom, without handshakes), 0 before the first."""
        return (self.uplink - self.handshake_up) / self.messages if self.messages else 0.0

    def ratio(self, dim: int) -> float:
        """Return how many times smaller the mean message is than a float32 update ``[dim]``, 0 before the first message."""
        return 4 * dim / self.mean_message if self.messages else 0.0

    def state_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counters from ``state_dict``.

        Raises:
            ConfigurationError: if a counter is missing, unknown or negative.
        """
        names = [counter.name for counter in fields(self)]
        require(set(state) == set(names), f"Expected the counters {names} but got {sorted(state)}")
        for name, value in {name: _count(state[name]) for name in names}.items():
            setattr(self, name, value)


def _count(n_bytes: int) -> int:
    value = index(n_bytes)
    require(value >= 0, f"Expected a number of bytes >= 0 but got {value}")
    return value
