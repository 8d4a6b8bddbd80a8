"""The values that cross the wire in a round, and their bytes: nothing else does.

Down: a ``Request`` with the ``Context``, a ``Download`` where the client needs one, and what the stage itself sends. Up: a ``Reply``.
Sizes are lengths of these bytes. Who sent a reply, and to which request, is known to whatever carries it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedlight.aggregation.base import TRAIN, Aggregator
from fedlight.core.buffers import Spec, specs
from fedlight.core.codec import Context, Key
from fedlight.core.errors import MessageError
from fedlight.core.layout import flatten, float_buffers
from fedlight.core.model import Model, number_bytes, numbers
from fedlight.core.packing import DTYPES, pack, unpack
from fedlight.core.wire import Message
from fedlight.privacy.mechanism import PrivacyMechanism

LACKS = b"lacks"
"""The reply of a client that lacks what its download builds on, such as the model of an earlier round: it is sent everything."""

_LENGTH = struct.Struct("<I")


@contextmanager
def _whole(what: str) -> Iterator[None]:
    """Raise ``MessageError`` for whatever damaged bytes lead to."""
    try:
        yield
    except MessageError:
        raise
    except (TypeError, ValueError, LookupError, OverflowError, RuntimeError) as error:
        raise MessageError(f"Expected {what} but its bytes are damaged: {error}") from error


@dataclass(frozen=True)
class Download:
    """What a client downloads to hold the model before a round, and the current encoder.

    Attributes:
        round: the number of server steps in the model that the client ends with.
        since: the number of server steps in the model that ``sums`` build on; 0 is the initial model, which is drawn from the seed.
        model: the whole model; None if the client takes the server's steps itself.
        sums: messages of the rounds that the client missed (``rounds.sums``), each with the version of its codec.
        encoders: encoder files by version, the current one last.
        decoders: what decoders hold beyond their encoders, by version (``rounds.held``).
        buffers: the buffers ``[buffer_dim]``, where ``sums`` carry the weights alone.
        extras: what else training changed in the model so far, by name, where it comes with ``sums``.
        version: the version of the current codec; 0 for one that nobody downloads.
        keep: whether a later download may build on the model that the client ends with.
        result: that model itself, for a client in the same process as the server: never serialised.
    """

    round: int
    since: int = 0
    model: Model | None = None
    sums: tuple[tuple[int, bytes], ...] = ()
    encoders: tuple[tuple[int, bytes], ...] = ()
    decoders: tuple[tuple[int, bytes], ...] = ()
    buffers: Tensor = field(default_factory=lambda: torch.empty(0))
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    version: int = 0
    keep: bool = False
    result: Model | None = None

    @cached_property
    def _parts(self) -> list[bytes]:
        """A header, then what it lists, one behind the other."""
        whole = self.model or Model(torch.empty(0), self.buffers, self.extras)
        files = [self.sums, self.encoders, self.decoders]
        listed = [[(version, len(data)) for version, data in group] for group in files]
        dim = len(self.model.weights) if self.model is not None else None
        more = pack(dict(whole.extras)) if whole.extras else b""
        types = [str(whole.weights.dtype), str(whole.buffers.dtype)]
        plain = not more and types == [str(torch.float32)] * 2
        header = pack([self.round, self.since, self.version, self.keep, dim, len(whole.data), *listed, *([] if plain else [types, more])])
        return [_LENGTH.pack(len(header)), header, whole.data, *(data for group in files for _, data in group)]

    @property
    def nbytes(self) -> int:
        """Length of ``to_bytes``."""
        return sum(map(len, self._parts))

    @property
    def codec_bytes(self) -> int:
        """Bytes of encoders and decoders in it."""
        return sum(len(data) for group in (self.encoders, self.decoders) for _, data in group)

    def to_bytes(self) -> bytes:
        """Return the download as bytes."""
        return b"".join(self._parts)

    @classmethod
    @_whole("a download")
    def parse(cls, data: bytes) -> Download:
        """Return the download that ``to_bytes`` wrote; raises ``MessageError`` if it is damaged."""
        header, at = _header(data, 9, 11)
        number, since, version, keep, dim, size, *listed = header
        (weights, buffers), more = listed[3:] or (["torch.float32"] * 2, b"")
        whole, at = data[at : at + size], at + size
        extras = _extras(more) if more else {}
        model = replace(Model.parse(whole, dim or 0, DTYPES[weights], DTYPES[buffers]), extras=extras)
        groups = []
        for group in listed[:3]:
            files = []
            for of_version, length in group:
                files.append((of_version, data[at : at + length]))
                at += length
            groups.append(tuple(files))
        if at != len(data):
            raise MessageError(f"Expected a download of {at} bytes but got {len(data)}")
        sums, encoders, decoders = groups
        return cls(number, since, None if dim is None else model, sums, encoders, decoders, model.buffers, extras, version, keep)


@dataclass(frozen=True)
class Request:
    """What one client is asked in one stage.

    Attributes:
        client: the client.
        stage: which stage of the aggregation it is (``aggregation.TRAIN``: train and send the code).
        context: what everybody knows.
        download: what the client needs first, in the first stage of an attempt.
        payload: what the aggregation sends in this stage, such as the others' keys.
        settled: the last attempt of this client that counted: what the client changed in it is final, what it changed in others is not.
    """

    client: int
    stage: str
    context: Context
    download: Download | None = None
    payload: bytes = b""
    settled: Key | None = None

    @cached_property
    def _head(self) -> bytes:
        download = -1 if self.download is None else self.download.nbytes
        header = pack([self.stage, self.settled, len(context_bytes(self.context)), download, len(self.payload)])
        return _LENGTH.pack(len(header)) + header

    @property
    def nbytes(self) -> int:
        """Length of ``to_bytes``."""
        download = 0 if self.download is None else self.download.nbytes
        return len(self._head) + len(context_bytes(self.context)) + download + len(self.payload)

    def reply(self, payload: Message, **more: Any) -> Reply:
        """Return a reply to this request, with ``more`` of its attributes."""
        return Reply(self.client, self.stage, payload, key=self.context.key, **more)

    def to_bytes(self) -> bytes:
        """Return the request as bytes."""
        download = b"" if self.download is None else self.download.to_bytes()
        return b"".join([self._head, context_bytes(self.context), download, self.payload])

    @classmethod
    @_whole("a request")
    def parse(cls, client: int, data: bytes) -> Request:
        """Return the request of ``client`` that ``to_bytes`` wrote; raises ``MessageError`` if it is damaged."""
        header, at = _header(data, 5)
        stage, settled, *lengths = header
        context, download, payload = lengths
        if at + context + max(download, 0) + payload != len(data):
            raise MessageError(f"Expected a request of {at + context + max(download, 0) + payload} bytes but got {len(data)}")
        public = parse_context(data[at : at + context])
        at += context
        file = None if download < 0 else Download.parse(data[at : at + download])
        return cls(client, stage, public, file, data[len(data) - payload :], tuple(settled) if settled is not None else None)


def context_bytes(context: Context) -> bytes:
    """Return a context as bytes, made once for all clients that are sent it."""
    made: bytes | None = context.__dict__.get("_bytes")
    if made is None:
        made = pack([context.seed, context.round, context.attempt, context.step, dict(context.broadcast)])
        context.__dict__["_bytes"] = made
    return made


def parse_context(data: bytes) -> Context:
    """Return the context that ``context_bytes`` wrote; raises ``MessageError`` if it is damaged."""
    values = unpack(data)
    sound = isinstance(values, list) and len(values) == 5 and all(isinstance(n, int) for n in values[:4]) and isinstance(values[4], dict)
    if not sound:
        raise MessageError("Expected a context of seed, round, attempt, step and broadcast but got something else")
    return Context(*values)


def _extras(data: bytes) -> dict[str, Tensor]:
    """Return tensors by name, as packed."""
    found = unpack(data)
    if not isinstance(found, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        raise MessageError("Expected tensors by name but got something else")
    return found


def _header(data: bytes, *entries: int) -> tuple[list, int]:  # type: ignore[type-arg]
    """Return the header's entries, of which there may be so many, and where it ends."""
    if len(data) < _LENGTH.size:
        raise MessageError(f"Expected a header but got {len(data)} bytes")
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    header = unpack(data[_LENGTH.size : end])
    if not isinstance(header, list) or len(header) not in entries:
        raise MessageError(f"Expected a header of {entries[0]} entries but got another")
    return header, end


@dataclass(frozen=True)
class Simulation:
    """What a simulation sees of a client and no server would: never serialised (law 9).

    ``update`` ``[dim]`` is the plain update; ``reason`` says why a client has nothing usable to send; ``saturation`` is the share of its
    code at the end of the range, where the simulation compares.
    """

    update: Tensor | None = None
    loss: float = 0.0
    reason: str | None = None
    saturation: float | None = None


@dataclass
class Reply:
    """What one client answers in one stage. An empty ``payload`` says that it has nothing usable to send.

    Attributes:
        client: the client, as whatever carries the reply knows it.
        stage: the stage that it answers.
        payload: the message of the stage: a code, or a part of a handshake.
        weight: the client's weight in the sum; None where it does not travel beside the code.
        buffers: buffers ``[buffer_dim]`` after training (empty where they stay with the client).
        inside: whether the code was within the clipping norm; None where that is not sent.
        simulation: what only a simulation sees.
        key: the attempt of the request that it answers, as whatever carries the reply knows it.
        extras: what else training changed, by name (``fedlight.core.buffers``); None for a model that has nothing of the kind.
    """

    client: int
    stage: str
    payload: Message
    weight: int | None = None
    buffers: Tensor = field(default_factory=lambda: torch.empty(0))
    inside: bool | None = None
    simulation: Simulation | None = None
    key: Key | None = None
    extras: Mapping[str, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Length of ``to_bytes``."""
        return len(self.payload) + len(self._tail) if self.payload else 0

    def to_bytes(self) -> bytes:
        """Return the payload and what follows it; nothing if there is no payload."""
        return b"".join([self.payload, self._tail]) if self.payload else b""

    @cached_property
    def _tail(self) -> bytes:
        """Extras, buffers, weight (4 bytes) and clipping bit (1 byte), where they are sent.

        Extras are a zero byte where there could be some; or their bytes, the length of these (4 bytes) and a one.
        """
        extras = pack(dict(self.extras)) if self.extras else b""
        return b"".join(
            [
                extras + _LENGTH.pack(len(extras)) + b"\1" if extras else b"" if self.extras is None else b"\0",
                number_bytes(self.buffers) if len(self.buffers) else b"",
                b"" if self.weight is None else _LENGTH.pack(self.weight),
                b"" if self.inside is None else bytes([self.inside]),
            ]
        )


@dataclass(frozen=True)
class ReplyFormat:
    """What follows the payload of a reply that carries a code: known to both sides from the settings of the run.

    ``buffers`` is how many numbers of ``dtype``, ``weight`` and ``inside`` say whether these are sent, ``extras`` shape and type of what
    else clients may send (None for one that holds nothing yet), or None if there is nothing of the kind.
    """

    buffers: int = 0
    weight: bool = False
    inside: bool = False
    dtype: torch.dtype = torch.float32
    extras: Mapping[str, Spec | None] | None = None

    @classmethod
    def of(
        cls, network: nn.Module, statistics: bool, by_samples: bool, aggregator: Aggregator, privacy: PrivacyMechanism | None
    ) -> ReplyFormat:
        """Return the format that the settings of a run lead to, for models like ``network``.

        ``statistics`` says whether its running statistics are sent. Beside protected codes nothing else is sent in the clear.
        """
        buffers, shown = flatten(float_buffers(network)) if statistics else torch.empty(0), not aggregator.hides_messages
        clear = (specs(network) or None) if shown and privacy is None else None
        return cls(buffers.numel(), by_samples and shown, privacy is not None and privacy.sends_bits, buffers.dtype, clear)

    def parse(self, request: Request, data: bytes) -> Reply:
        """Return the reply to a request that ``Reply.to_bytes`` wrote.

        Raises:
            MessageError: if it is shorter than what must follow the payload, the clipping bit is none, or there are other extras than the
                model has.
        """
        if request.stage != TRAIN or request.context.step > 0 or not data or data == LACKS:  # a payload alone
            return request.reply(data)
        size = self.buffers * self.dtype.itemsize
        end = len(data) - size - 4 * self.weight - self.inside
        if end - (self.extras is not None) < 1:
            raise MessageError(f"Expected a reply of more than {len(data) - end} bytes but got {len(data)}")
        buffers = numbers(data[end : end + size], self.dtype)
        weight = _LENGTH.unpack_from(data, end + size)[0] if self.weight else None
        if self.inside and data[-1] > 1:
            raise MessageError(f"Expected a clipping bit of 0 or 1 but got {data[-1]}")
        extras, end = self._read_extras(data, end)
        inside = bool(data[-1]) if self.inside else None
        return request.reply(data[:end], weight=weight, buffers=buffers, inside=inside, extras=extras)

    def _read_extras(self, data: bytes, end: int) -> tuple[dict[str, Tensor] | None, int]:
        """Return the extras that end at ``end``, and where the payload ends."""
        if self.extras is None:
            return None, end
        if data[end - 1] == 0:
            return {}, end - 1
        with _whole("extras"):
            size = _LENGTH.unpack_from(data, max(end - 5, 0))[0]
            found = _extras(data[end - 5 - size : end - 5])
        if data[end - 1] > 1 or size > end - 6:
            raise MessageError(f"Expected extras that end {size} bytes before but got a reply of {end} bytes")
        for name, tensor in found.items():
            spec = (tuple(tensor.shape), str(tensor.dtype))
            if name not in self.extras or self.extras[name] not in (None, spec):
                raise MessageError(f"Expected an extra of the model but got {name[:80]!r} of {tensor.dtype} {list(tensor.shape)}")
        return found, end - 5 - size


@dataclass
class ClientUpdate:
    """A client's update before it is encoded, on the client's side: callbacks may read and change it.

    ``update`` ``[dim]`` holds all that is averaged; ``weight`` is the client's weight in the sum; ``usable`` is False for a client whose
    training failed and that sends a code of zeros, as it does under a privacy mechanism; ``grew`` whether its loss was finite at first;
    ``extras`` are those of a ``Reply``; ``reason`` says why it cannot be used, where that is known already.
    """

    client: int
    update: Tensor
    buffers: Tensor
    weight: int
    loss: float
    usable: bool = True
    grew: bool = True
    extras: Mapping[str, Tensor] | None = None
    reason: str | None = None
