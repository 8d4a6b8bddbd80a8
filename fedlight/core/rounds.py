"""The values that travel through one round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlight.core.codec import Context
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import Message


@dataclass
class Upload:
    """What one client makes of a round, and the message that leaves it.

    ``update`` ``[dim]`` and ``loss`` never leave the client: only ``message``, ``weight`` and ``buffers`` ``[buffer_dim]``
    (BatchNorm statistics, sent in the clear) do. Under a privacy mechanism a client whose training failed is not ``usable`` and sends
    a code of zeros; ``inside`` says whether its code was within the clipping norm, where that is sent.
    """

    client: int
    update: Tensor
    buffers: Tensor
    weight: int
    loss: float
    weighted: bool = False
    _message: Message | Future[Message] = b""
    usable: bool = True
    inside: bool | None = None

    @property
    def message(self) -> Message:
        """The bytes that leave the client; where they are still being encoded, whoever asks waits, and gets the encoder's error."""
        self.settle()
        assert not isinstance(self._message, Future)
        return self._message

    @message.setter
    def message(self, message: Message) -> None:
        self._message = message

    def expect(self, message: Future[Message]) -> None:
        """Take the message from another thread, which encodes it."""
        self._message = message

    @property
    def expected(self) -> bool:
        """Whether the message comes from another thread and nobody has got it yet."""
        return isinstance(self._message, Future)

    def settle(self) -> None:
        """Wait for the message if it comes from another thread, whose error is raised here."""
        if isinstance(self._message, Future):
            self._message = self._message.result()

    def outside(self) -> Upload:
        """Return what is seen of the upload outside of the client, where nothing but the message may be: no view of its tensors either."""
        seen = Upload(self.client, torch.empty(0), torch.empty(0), 1, math.nan)
        seen.message = self.message
        return seen

    @property
    def sent_bytes(self) -> int:
        """Bytes of everything the client sends: message, buffers, 4 for its weight where weights differ, 1 for its clipping bit."""
        beside = (4 if self.weighted else 0) + (0 if self.inside is None else 1)
        return len(self.message) + self.buffers.numel() * self.buffers.element_size() + beside


@dataclass
class Round:
    """One attempt at a round: who takes part, what has arrived, what went wrong.

    Attributes:
        public: what everybody knows before the current pass.
        cohort: the clients that are invited, sorted.
        mine: those that answer and that this process runs.
        absent: how many did not answer.
        server: what the algorithm's server tells every client before the round.
        codes: what the server has added up so far.
        refused: why the decoded aggregate was refused, if it was.
        dropped: clients run here whose update could not be used, with the reason; ``dropped_count`` counts those of all processes.
        buffers: (client, weight, buffers) of the clients run here.
        true: the sum of the plain updates, kept only where the simulation compares (``sim/``).
        uplink: bytes that clients sent in this pass (of the clients run here, until ``merge``).
        uplink_passes: bytes that clients sent in all passes so far.
        sent: messages that clients sent in this pass, likewise.
        handshake_up: bytes that clients sent beside their messages (keys, shares, signatures of a secure aggregation).
        handshake_down: bytes that they were sent for it.
        failed: why the attempt ended without a sum, if it did.
        loss: sum of the losses of ``trained`` clients, likewise.
        arrived: clients whose message was taken into account in this pass, by this process.
        inside: clients whose code was within the clipping norm, where they say so.
        saturation: share of the code at the end of its range, of every client looked at, kept where ``true`` is.
        aggregate: the decoded aggregated update ``[dim]``, once there is one.
    """

    context: Context
    cohort: np.ndarray
    mine: np.ndarray
    absent: int = 0
    server: Mapping[str, Any] = field(default_factory=dict)
    codes: RunningSum = field(default_factory=RunningSum)
    refused: str | None = None
    dropped: list[tuple[int, str]] = field(default_factory=list)
    dropped_count: int = 0
    uplink_passes: int = 0
    buffers: list[tuple[int, int, Tensor]] = field(default_factory=list)
    true: RunningSum | None = None
    uplink: int = 0
    sent: int = 0
    handshake_up: int = 0
    handshake_down: int = 0
    failed: str | None = None
    trained: int = 0
    loss: float = 0.0
    arrived: set[int] = field(default_factory=set)
    inside: int = 0
    saturation: list[float] = field(default_factory=list)
    aggregate: Tensor | None = None
