"""The sum of a cohort's codes: the extension point, in two halves, and the sum in the clear, which is the default."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from fedlight.core.codec import Codec, Context, Decoder, Encoder
from fedlight.core.errors import ProtocolError
from fedlight.core.model import Model
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import Message

TRAIN = "train"
"""The stage in which clients train and send their codes; every other stage of an aggregation is a part of its handshake."""


@dataclass(frozen=True)
class AggregationSetting:
    """What is known of a run before it begins: what an aggregator may refuse.

    Args:
        codec: the codec, maybe not fitted yet.
        cohort: clients of the first round.
        largest_weight: the largest weight of any client; 1 if all count equally.
        buffers: whether clients send statistics of BatchNorm layers beside their codes.
        processes: how many processes share the cohort.
        training: the settings of a client's local training, as text.
        min_clients: codes that a sum must have to be used.
        algorithm: name of the algorithm of local training.
        vectors: vectors that its clients upload; 1 if the update is all.
        scalars: numbers that they upload beside these.
    """

    codec: Codec
    cohort: int
    largest_weight: int
    buffers: bool
    processes: int
    training: str = ""
    min_clients: int = 1
    algorithm: str = "the algorithm"
    vectors: int = 1
    scalars: int = 0


@dataclass(frozen=True)
class Held:
    """What a client holds when it answers a request: the context, its encoder, and the model that it starts from."""

    context: Context
    encoder: Encoder
    model: Model


class Sealer:
    """The client's half: makes the message that leaves a client out of its code. One object serves all clients of a process."""

    def answer(self, stage: str, client: int, payload: bytes, held: Held) -> bytes:
        """Return what a client sends in a stage of the handshake, of what the server sent it.

        Raises:
            MessageError: if what the server sent must not be answered.
        """
        raise ProtocolError(f"Expected no stage but {TRAIN!r} but was asked for {stage!r}")

    def seal(self, client: int, code: Tensor, weight: int, payload: bytes, held: Held) -> Message:
        """Return the message of a code ``[code_dim]`` that the encoder made, protection applied: as it is, if nothing hides it.

        Raises:
            MessageError: if the code must not be sent.
        """
        return held.encoder.message(code, held.context)

    def suspend(self, client: int) -> bytes:
        """Return the secrets that a client holds in the middle of an attempt, and forget them; empty if there are none."""
        return b""

    def resume(self, client: int, secrets: bytes, held: Held) -> None:
        """Go on from what ``suspend`` returned, once."""


class Collector(ABC):
    """The server's half of one pass: what it asks of the clients, stage by stage, and the sum of what they send.

    Law: ``finish`` returns the sum of ``weight * code`` over the clients whose codes arrived, exactly for integers, whatever their
    order; and what the collector held on the way is no longer than a few codes, whatever the size of the cohort.

    Attributes:
        faults: clients whose last message turned out to be wrong when the sum was made without it, with the reason.
    """

    faults: Mapping[int, str] = MappingProxyType({})

    def requests(self, stage: str) -> Mapping[int, bytes] | None:
        """Return what each client that is asked is sent in a stage; None for nothing, to everybody. Closes the stage before.

        Raises:
            MessageError: if too few clients are left.
        """
        return None

    @abstractmethod
    def receive(self, stage: str, client: int, message: Message, weight: int) -> None:
        """Take a message that arrived into account.

        Raises:
            MessageError: if the message is malformed or was meant for another round or codec.
        """

    @abstractmethod
    def finish(self) -> RunningSum:
        """Return the sum; raises ``MessageError`` if there is none."""


class Aggregator(ABC):
    """Makes the two halves of an aggregation. Constructor arguments are kept as attributes of the same names.

    Attributes:
        stages: the stages of a pass, in order.
        hides_messages: whether the server must not see single codes.
        opened_by: the stage in which clients reveal what opens the sum; None if the server sees it anyway.
        sums: whether the result is the sum of the codes, so that bounding each bounds what a client can change.
        sim_logs: whether the simulation may log what needs single clients' updates or losses.
    """

    stages: ClassVar[tuple[str, ...]] = (TRAIN,)
    hides_messages: bool = False
    opened_by: ClassVar[str | None] = None
    sums: bool = True
    sim_logs: bool = True

    def check(self, setting: AggregationSetting) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse, with a ``ConfigurationError``, a run that cannot work: before anything is trained."""

    def enroll(self, directory: Mapping[int, bytes], settings: str) -> None:  # noqa: B027 (most need no keys)
        """Take the identity keys and the settings of clients that do not live in this process."""

    def sealer(self) -> Sealer:
        """Return the clients' half."""
        return Sealer()

    @abstractmethod
    def collector(self, context: Context, codec: Codec, cohort: Sequence[int], model: Model, device: torch.device) -> Collector:
        """Return the server's half of one pass, for a cohort that starts from the global ``model``; the sum lies on ``device``.

        Raises:
            MessageError: if there can be no sum of this cohort.
        """

    def describe(self) -> str:
        """Return class and constructor arguments as text: what must be equal for a run to be resumed. Nothing secret is in it."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in ("self", "args", "kwargs")]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class PlainCollector(Collector):
    """Adds up codes ``[n]`` as they arrive, or what ``bounded`` makes of each, in the clear."""

    def __init__(
        self, context: Context, decoder: Decoder, device: torch.device, bounded: Callable[[Tensor], Tensor] = lambda code: code
    ) -> None:
        self.context = context
        self.decoder = decoder
        self.device = device
        self.bounded = bounded
        self.codes = RunningSum()

    def receive(self, stage: str, client: int, message: Message, weight: int) -> None:
        """Add one client's code to the running sum."""
        self.codes.add(self.bounded(self.decoder.read_message(message, self.context, self.device)), weight)

    def finish(self) -> RunningSum:
        """Return the sum."""
        return self.codes


class PlainAggregator(Aggregator):
    """Adds up codes as they arrive, in the clear: the server could look at each, and does not."""

    def collector(self, context: Context, codec: Codec, cohort: Sequence[int], model: Model, device: torch.device) -> Collector:
        """Return a running sum."""
        return PlainCollector(context, codec.decoder, device)
