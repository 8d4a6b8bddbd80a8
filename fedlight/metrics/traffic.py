"""Bytes in both directions, counted from the messages sent (law 6) and exact at any size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrafficCounter:
    """Bytes sent since the run began, as Python integers: a float would lose bytes beyond 2^53.

    Args:
        uplink: bytes from clients, including handshakes.
        downlink: bytes to clients, including encoders and handshakes.
        codec: the encoders' part of ``downlink``.
        messages: number of messages in ``uplink``.
        handshake_up: keys, shares and signatures of secure aggregation in ``uplink``.
        handshake_down: those in ``downlink``.

    >>> traffic = TrafficCounter()
    >>> traffic.add(up=116, messages=1, down=4_000, codec=1_000)
    >>> traffic.uplink, traffic.downlink, traffic.codec, round(traffic.ratio(1_000), 1)
    (116, 5000, 1000, 34.5)
    """

    uplink: int = 0
    downlink: int = 0
    codec: int = 0
    messages: int = 0
    handshake_up: int = 0
    handshake_down: int = 0

    def add(self, up: int = 0, messages: int = 0, down: int = 0, codec: int = 0, handshake_up: int = 0, handshake_down: int = 0) -> None:
        """Count bytes of codes ``up`` in so many messages, and bytes ``down``; those of encoders and of handshakes apart."""
        self.uplink += up + handshake_up
        self.messages += messages
        self.downlink += down + codec + handshake_down
        self.codec += codec
        self.handshake_up += handshake_up
        self.handshake_down += handshake_down

    @property
    def mean_message(self) -> float:
        """Mean bytes of a message (masked codes with headroom, without handshakes), 0 before the first."""
        return (self.uplink - self.handshake_up) / self.messages if self.messages else 0.0

    def ratio(self, dim: int) -> float:
        """Return how many times smaller the mean message is than a float32 update ``[dim]``, 0 before the first message."""
        return 4 * dim / self.mean_message if self.messages else 0.0
