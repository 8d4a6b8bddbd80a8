"""The codec interface: what a client encodes, what the server adds up, what it decodes. Read this file first.

A codec is a pair of halves that live on two sides of a wire. Its laws, by their numbers in ``CONTRIBUTING.md`` (the contract test
``tests/codecs/test_contract.py`` checks each):

1. ``decode(mean_i encode(u_i))`` approximates ``mean_i u_i``; a linear codec equals ``decode(encode(mean_i u_i))`` to rounding.
2. ``decode(encode(0)) == 0`` for linear codecs; every codec maps finite to finite.
3. The server adds ``open(code)`` to a running sum as codes arrive. For an additive codec ``open`` is the identity and the sum has
   ``code_dim`` entries; a codec that cannot be summed decodes in ``open``, so that the sum is as long as the update, and says
   ``additive = False``.
4. A client needs the encoder alone, the server the decoder alone: two modules, two files.
8. Whatever scales a code is in ``Context``: known to everyone before the pass, never computed from the cohort's own plain updates.
   (A codec that is not additive may send a scale of the client's own inside the message.)

An ``unbiased`` codec decodes, on average over the client's draws, to the update itself.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlight.core.bank import UpdateBank
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import HEADER, Format, Message, read_message, write_message

State = dict[str, Any]
Plan = dict[str, Any]
Key = tuple[int, int]
"""An attempt: round and attempt number."""


@dataclass(frozen=True)
class Context:
    """What everybody knows before a pass of a round.

    ``step`` counts the codec's passes (0 .. ``codec.passes - 1``); ``broadcast`` is what the server tells every client before the pass: the
    codec's own state (``Decoder.broadcast``: a gain, the previous pass's result), a clipping norm, the algorithm's control variate.
    """

    seed: int = 0
    round: int = 0
    attempt: int = 0
    step: int = 0
    broadcast: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Round and attempt: what clients' drafts and replies belong to."""
        return self.round, self.attempt


@dataclass(frozen=True)
class ServerContext(Context):
    """What the server knows besides: how many codes were summed (the effective number, if weights differ), and ``noise``.

    That is the variance of the noise that privacy put on every entry of their mean, in the code's own units. ``lost`` is the share of the
    entries that are known to be wrong and were set to 0 (``fedlight.core.windows``).
    """

    clients: float = 0
    noise: float = 0
    lost: float = 0

    @classmethod
    def of(cls, context: Context, clients: float, noise: float = 0, lost: float = 0) -> ServerContext:
        """Return a context with what the server knows of the sum."""
        return cls(context.seed, context.round, context.attempt, context.step, context.broadcast, clients, noise, lost)


@dataclass
class Private:
    """What only the client knows: its generator (stochastic rounding) and the state it keeps between passes and rounds."""

    generator: torch.Generator
    state: State = field(default_factory=dict)


class CodecPart(nn.Module):
    """What encoder and decoder share: the layout of updates, the format of codes on the wire, and the codec's digest.

    Attributes:
        digest: 32 bytes that no other codec has: of another configuration, version or encoder (``Codec.update_digest``).
    """

    def __init__(self, layout: Layout, format: Format) -> None:
        super().__init__()
        self.layout = layout
        self.format = format
        self.digest = bytes(32)

    @property
    def fingerprint(self) -> int:
        """The first 4 bytes of the digest, which messages carry: they reveal mistakes, the whole digest reveals malice."""
        return int.from_bytes(self.digest[:4], "little")

    @property
    def dim(self) -> int:
        """Length of an update."""
        return self.layout.dim

    @property
    def code_dim(self) -> int:
        """Length of a code."""
        return self.format.length

    def format_at(self, step: int) -> Format:
        """Return the format of a pass's codes: the same in every pass, unless the codec says otherwise."""
        return self.format


class Encoder(CodecPart, ABC):
    """The client's half."""

    @abstractmethod
    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the code ``[..., code_dim]`` of updates ``[..., dim]``; ``private.state`` may be changed in place."""

    def common_step(self, context: Context) -> float | None:
        """Return the step of integer codes, 1 for float codes; None if there is no step that all coefficients have in common."""
        return None if self.format_at(context.step).bits else 1.0

    def message(self, code: Tensor, context: Context) -> bytearray:
        """Return the bytes that a client sends of a code ``[code_dim]``: header and packed code."""
        format = self.format_at(context.step)
        return write_message(format.pack(code), format.kind, format.length, context.round, self.fingerprint)

    def encode_message(self, update: Tensor, context: Context, private: Private) -> bytearray:
        """Return the bytes that a client sends for one update ``[dim]``. Needs no Lightning."""
        with torch.no_grad():
            return self.message(self.encode(update, context, private), context)


class Decoder(CodecPart, ABC):
    """The server's half.

    Attributes:
        replayable: whether what it decodes depends on the code and the announcements alone, not on the server's own ``state``: whoever
            holds the decoder can then take the server's step from the sum of codes.
        linear_map: whether ``decode`` without announcements is a linear map of the code, the same in every round, and ``coordinates``
            looks back along it.
    """

    replayable: bool = True
    linear_map: bool = False

    @abstractmethod
    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the aggregated update ``[dim]`` of a mean code ``[..., code_dim]`` (after the last pass).

        Before the last pass the result is what the server broadcasts for the next one. ``state`` is the server's own and may be
        changed in place. ``context`` is a ``ServerContext`` where the server knows how many codes were summed.
        """

    def coordinates(self, update: Tensor) -> Tensor:
        """Return the float code ``[..., code_dim]`` that a ``linear_map`` decodes to what comes nearest to updates ``[..., dim]``."""
        raise ConfigurationError(f"Expected a decoder that is a linear map, which {type(self).__name__} is not")

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return how long an aggregate this mean code can explain; the server refuses a longer one. Inf where nothing is too long."""
        return math.inf

    def observe(self, mean_code: Tensor, context: Context, aggregate: Tensor) -> Tensor:
        """Return what the server knows of a mean update ``[dim]``, to fit the next codec to: more, where codes tell what they leave out."""
        return aggregate

    def open(self, code: Tensor) -> Tensor:
        """Return what the server adds up for a code, which must not be changed in place: the code itself, if it can be summed."""
        return code

    def sum_length(self, step: int = 0) -> int:
        """Return how many numbers ``open`` makes of a pass's code: as many as the code has, unless the codec cannot be summed."""
        return self.format_at(step).length

    def broadcast(self, state: State) -> State:
        """Return the part of the server's state that every client is sent before a pass."""
        return {}

    def record_lengths(self, mean_bytes: float, state: State) -> None:
        """Take note, before ``decode``, of the mean length of a pass's messages: a server that steers it does so by what it announces."""

    def read_message(self, message: Message, context: Context, device: torch.device | str = "cpu") -> Tensor:
        """Return what the server adds up for one client's message, on ``device`` (the decoder's): not to be changed in place.

        Raises ``MessageError`` if the message is malformed or was meant for another round or codec.
        """
        format = self.format_at(context.step)
        code = format.unpack(read_message(message, format, context.round, self.fingerprint))
        return self.open(code.to(device))

    def decode_sum(
        self, messages: Iterable[Message], weights: Iterable[int], context: Context, state: State, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the aggregated update ``[dim]`` of a cohort's messages, on the decoder's ``device``. Needs no Lightning.

        Raises ``MessageError`` as ``read_message`` does, ``ConfigurationError`` for no message, or a weight below 1.
        """
        total, lengths = RunningSum(), 0
        for message, weight in zip(messages, weights, strict=True):
            if weight < 1:
                raise ConfigurationError(f"Expected `weights` >= 1 but got {weight}")
            total.add(self.read_message(message, context, device), weight)
            lengths += len(message)
        if not total.count:
            raise ConfigurationError("Expected at least one message but got none")
        self.record_lengths(lengths / total.count, state)
        with torch.no_grad():
            return self.decode(total.mean(), ServerContext.of(context, total.effective_count), state)


TrainCodec = Callable[["Codec", UpdateBank], dict[str, float]]
"""Trains the tensors of a codec's two halves jointly on a bank and returns figures to report."""


class Codec(ABC):
    """A recipe for a pair of halves, and the pair once the shapes are known.

    Constructor arguments are configuration and kept as attributes of the same names (scikit-learn's convention), so that a codec
    describes itself. ``bind`` makes the halves for a layout, ``fit`` adapts them to an update bank.

    Attributes:
        additive: whether codes are summed; else every message is decoded by itself.
        linear: whether laws 1 and 2 hold exactly.
        unbiased: whether codes decode, on average over the client's draws, to the update itself.
        passes: how often a client sends in a round.
        needs_fit: whether the halves have to be adapted to recorded updates.
        trained: whether fitting takes ``train``, which a closed form does without.
        client_state: whether clients remember something from one of their rounds to the next.
        integer: whether codes are integers.
        fixed_width: whether all messages have the same length, so that masks can hide codes.
        most_clients: how many codes a masked sum has room for, and of equal weight; 0 if there is room for whatever is declared.
    """

    additive: bool = True
    linear: bool = False
    unbiased: bool = False
    passes: int = 1
    needs_fit: bool = False
    trained: bool = False
    client_state: bool = False
    integer: bool = False
    fixed_width: bool = True
    most_clients: int = 0

    layout: Layout | None = None
    encoder: Encoder
    decoder: Decoder
    plan: Plan
    version: int = 0

    @abstractmethod
    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half for updates of this layout."""

    @abstractmethod
    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half for updates of this layout."""

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the shapes (plain numbers and lists) that the halves need beyond configuration and layout."""
        return {}

    @property
    def bound(self) -> bool:
        """Whether the halves exist."""
        return self.layout is not None

    @property
    def fitted(self) -> bool:
        """Whether the codec can be used: bound, and fitted to a bank if it has to be."""
        return self.bound and (self.version > 0 or not self.needs_fit)

    def bind(self, layout: Layout, plan: Plan | None = None) -> Self:
        """Make both halves for updates of this layout; raises ``ConfigurationError`` if a code would be longer than the update."""
        self.plan = self.make_plan(layout, None) if plan is None else plan
        self.encoder = self.make_encoder(layout, self.plan)
        self.decoder = self.make_decoder(layout, self.plan)
        formats = [self.encoder.format_at(step) for step in range(self.passes)]
        if formats != [self.decoder.format_at(step) for step in range(self.passes)]:
            raise ConfigurationError(f"{type(self).__name__}: encoder and decoder disagree on the code's format")
        longest = max(format.length for format in formats)
        if longest > layout.dim and self.additive:
            raise ConfigurationError(
                f"Expected a code no longer than the update ({layout.dim:,} numbers) but {type(self).__name__} makes one of "
                f"{longest:,}: choose a larger `ratio`"
            )
        self.layout = layout
        self.update_digest()
        return self

    def fit(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Adapt the codec to recorded updates and return figures to report. Raises the version by one."""
        self.bind(bank.layout, self.make_plan(bank.layout, bank))
        figures = self.fit_halves(bank, train)
        self.version += 1
        self.update_digest()
        return figures

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the tensors of the halves from a bank: in closed form, or through ``train``."""
        return {}

    def references(self) -> dict[str, Codec]:
        """Return codecs of the same code length, by name, to compare this one with after fitting."""
        return {}

    def update_digest(self) -> None:
        """Give both halves the codec's digest."""
        self.encoder.digest = self.decoder.digest = codec_digest(self.describe(), self.encoder)

    def config(self) -> dict[str, Any]:
        """Return class path and constructor arguments, nested codecs included: enough to make the recipe again."""
        kind, arguments = type(self), self._arguments(lambda codec: codec.config())
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}

    def unbound(self) -> Self:
        """Return a new codec of the same configuration, nested codecs included, that is bound to nothing."""
        return type(self)(**self._arguments(lambda codec: codec.unbound()))

    def _arguments(self, of: Callable[[Codec], Any]) -> dict[str, Any]:
        """Return the constructor's arguments by name, with what ``of`` makes of nested codecs in their place."""

        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return of(value) if isinstance(value, Codec) else value

        return {name: plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    def describe(self) -> dict[str, Any]:
        """Return everything but the tensors, as plain data: configuration, layout, plan and version."""
        if self.layout is None:
            raise CodecMismatchError(f"{type(self).__name__} has no shapes yet: call bind(layout) first")
        return {"config": self.config(), "layout": self.layout.to_json(), "plan": self.plan, "version": self.version}

    def to(self, device: torch.device | str) -> Self:
        """Move both halves."""
        self.encoder.to(device)
        self.decoder.to(device)
        return self

    def mean_bytes(self, codes: Tensor, step: int = 0) -> float:
        """Return how long messages of a pass's codes ``[..., code_dim]`` are on average, header included."""
        format = self.encoder.format_at(step)
        if format.fixed_width:
            return HEADER.size + format.payload_bytes
        payloads = [format.pack(code) for code in codes.reshape(-1, format.length)]
        return HEADER.size + sum(map(len, payloads)) / len(payloads)

    def reconstruct(self, updates: Tensor, state: State | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Return ``decode(mean_i encode(u_i))`` ``[..., dim]`` for cohorts ``[..., clients, dim]``, as a round would, in one process.

        ``state`` is the server's (a fresh one if not given), clients begin with none. To fit and to measure, not to run rounds: codes
        take no detour over bytes, and gradients reach both halves (``simulate_round`` carries messages).
        """
        state = {} if state is None else state
        private = Private(generator or torch.Generator().manual_seed(0))
        broadcast = dict(self.decoder.broadcast(state))
        for step in range(self.passes):
            context = Context(step=step, broadcast=broadcast)
            codes = self.encoder.encode(updates, context, private)
            self.decoder.record_lengths(self.mean_bytes(codes, step), state)
            codes = self.decoder.open(codes)
            result = self.decoder.decode(codes.to(updates.dtype).mean(-2), ServerContext.of(context, updates.shape[-2]), state)
            broadcast = {**self.decoder.broadcast(state), "reply": result.unsqueeze(-2)}
        return result


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Run without gradients and in full precision, whatever the process trains in: codecs' laws hold in float32."""
    # Entering `autocast` for every message where there is none would cost more than the message.
    return _without_autocast(device) if torch.is_autocast_enabled(device.type) else torch.no_grad()


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def codec_digest(description: Mapping[str, Any], encoder: Encoder) -> bytes:
    """Return the digest (BLAKE2b, 32 bytes) of a codec: of its description and of the encoder's tensors."""
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=32)
    for tensor in encoder.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
