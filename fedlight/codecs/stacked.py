"""One codec for several vectors of a model's shape plus a few numbers, in one message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, CodecPart, Context, Decoder, Encoder, Plan, Private, State, TrainCodec
from fedlight.core.codec_needs import require_fixed_width, require_room
from fedlight.core.errors import CodecMismatchError
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat, Format, JointFormat

P = TypeVar("P", bound=CodecPart)

_ONE = 1 << 16
"""Resolution of the 32-bit fixed-point numbers in a message; like integer codes they are summed exactly."""


class StackedHalf(CodecPart, Generic[P]):
    """What both halves share: one vector's half, and how many vectors and numbers a message holds; the numbers are in the last pass."""

    inner: P

    def __init__(self, layout: Layout, inner: P, vectors: int, scalars: int, passes: int) -> None:
        super().__init__(layout, inner.format)
        self.inner = inner
        self.vectors, self.scalars, self.passes = vectors, scalars, passes
        self.format = self.format_at(0)

    def numbers(self, step: int) -> int:
        """Return how many numbers a pass's messages hold."""
        return self.scalars if step == self.passes - 1 else 0

    def format_at(self, step: int) -> Format:
        """Return the inner format once per vector, plus 32 bits per number in the last pass."""
        one = self.inner.format_at(step)
        assert isinstance(one, (CodeFormat, JointFormat))
        parts = (one.parts if isinstance(one, JointFormat) else (one,)) * self.vectors
        return JointFormat(parts + (CodeFormat(self.scalars, 32),) * bool(self.numbers(step)))

    def each(self, flat: Tensor, length: int, context: Context) -> Iterator[tuple[str, Tensor, Context]]:
        """Yield the name of each vector's state, its ``length`` entries of ``flat`` ``[..., n]``, and its context."""
        for i in range(self.vectors):
            broadcast = dict(context.broadcast.get(str(i), {}))
            if "reply" in context.broadcast:
                broadcast["reply"] = context.broadcast["reply"].chunk(self.vectors, -1)[i]
            yield str(i), flat[..., i * length : (i + 1) * length], replace(context, broadcast=broadcast)


class StackedEncoder(StackedHalf[Encoder], Encoder):
    """Encodes each vector with the same encoder and its own state, and rounds the numbers."""

    def common_step(self, context: Context) -> float | None:
        """Return None: each vector has its own gain, and numbers have their own step."""
        return None

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the concatenated codes of all vectors, then the numbers."""
        codes = [
            self.inner.encode(part, own, Private(private.generator, private.state.setdefault(key, {})))
            for key, part, own in self.each(update, self.inner.dim, context)
        ]
        if self.numbers(context.step):
            fixed = (update[..., self.vectors * self.inner.dim :].double() * _ONE).round()
            codes.append(fixed.clamp(-(2.0**31 - 1), 2.0**31 - 1))
        dtype = torch.int32 if self.format_at(context.step).bits else torch.float64
        return torch.cat([code.to(dtype) for code in codes], -1)


class StackedDecoder(StackedHalf[Decoder], Decoder):
    """Decodes each vector's mean code with the same decoder and its own state."""

    def __init__(self, layout: Layout, inner: Decoder, vectors: int, scalars: int, passes: int) -> None:
        super().__init__(layout, inner, vectors, scalars, passes)
        self.replayable = inner.replayable

    def sum_length(self, step: int = 0) -> int:
        """Return the length of the terms to add up: of all vectors and the numbers."""
        return self.vectors * self.inner.sum_length(step) + self.numbers(step)

    def open(self, code: Tensor) -> Tensor:
        """Return the terms to add up: each vector's opened part, then the numbers."""
        length = code.shape[-1]
        end = length - (self.scalars if length == self.format_at(self.passes - 1).length else 0)
        opened = [self.inner.open(part) for part in code[..., :end].chunk(self.vectors, -1)]
        return torch.cat([*opened, code[..., end:]], -1)

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the concatenated mean vectors, then the mean numbers ``[..., vectors * dim + scalars]``."""
        length = self.inner.sum_length(context.step)
        means = [self.inner.decode(part, own, state.setdefault(key, {})) for key, part, own in self.each(mean_code, length, context)]
        return torch.cat([*means, mean_code[..., self.vectors * length :].to(means[0].dtype) / _ONE], -1)

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return the length that the vectors' mean codes can explain, with the numbers as they are."""
        length = self.inner.sum_length(context.step)
        lengths = [self.inner.norm_bound(part, own) for _, part, own in self.each(mean_code, length, context)]
        numbers = float((mean_code[..., self.vectors * length :].double() / _ONE).norm())
        return 1.000001 * math.hypot(*lengths, numbers)

    def observe(self, mean_code: Tensor, context: Context, aggregate: Tensor) -> Tensor:
        """Return what the server knows of each mean vector, then the mean numbers ``[vectors * dim + scalars]``."""
        codes = self.each(mean_code, self.inner.sum_length(context.step), context)
        known = torch.split(aggregate, self.inner.dim)
        seen = [self.inner.observe(part, own, mine) for (_, part, own), mine in zip(codes, known, strict=False)]
        return torch.cat([*seen, aggregate[self.vectors * self.inner.dim :]])

    def broadcast(self, state: State) -> State:
        """Return each vector's broadcast under its number."""
        broadcast = {str(i): self.inner.broadcast(state.setdefault(str(i), {})) for i in range(self.vectors)}
        return {key: value for key, value in broadcast.items() if value}


class StackedCodec(Codec):
    """Encodes all vectors that an algorithm's clients upload, plus a few numbers, with one codec into one message.

    All vectors share the codec's tensors, each with its own state; the codec is fitted to the first, the update. A number is a
    fixed-point integer of 32 bits (2^-16 apart, up to 32,767), summed like codes, in the clear: SecureAggregator refuses numbers,
    because their sums do not fit its 32 bits. `FederatedModule` builds a stack if the algorithm needs one.

    Args:
        codec: the codec of one vector.
        vectors: number of vectors ``[dim]`` in an upload.
        scalars: number of further numbers in an upload.

    Raises:
        ConfigurationError: if the codec's messages differ in length: nothing would tell where a vector ends; or its sums have windows,
            which only whole codes have.
    """

    def __init__(self, codec: Codec, vectors: int = 2, scalars: int = 0) -> None:
        why = "an algorithm whose clients upload several vectors or numbers"
        require_fixed_width(codec, why)
        require_room(codec, why)
        self.codec = codec
        self.vectors = vectors
        self.scalars = scalars
        self.additive, self.unbiased, self.passes = codec.additive, codec.unbiased and not scalars, codec.passes
        self.linear = codec.linear and not scalars
        self.integer, self.client_state, self.needs_fit = codec.integer, codec.client_state, codec.needs_fit
        self.trained, self.version = codec.trained, codec.version

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the inner codec's layout, plan and version."""
        inner = layout.unstacked(self.vectors, self.scalars)
        if self.codec.layout is None:
            self.codec.bind(inner)
        else:
            self.codec.layout.require_same(inner, f"The {type(self.codec).__name__} given")
        return {"layout": inner.to_json(), "plan": self.codec.plan, "version": self.codec.version}

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half."""
        inner = self.codec.make_encoder(self._inner(layout, plan), plan["plan"])
        return StackedEncoder(layout, inner, self.vectors, self.scalars, self.passes)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half."""
        inner = self.codec.make_decoder(self._inner(layout, plan), plan["plan"])
        return StackedDecoder(layout, inner, self.vectors, self.scalars, self.passes)

    def _inner(self, layout: Layout, plan: Plan) -> Layout:
        """Return the layout of one vector; raises ``CodecMismatchError`` unless a stack of them is the whole layout."""
        inner = Layout.from_json(plan["layout"])
        count = len(inner.names) * self.vectors + bool(self.scalars)  # looked at before as many are made
        if count != len(layout.names) or inner.stacked(self.vectors, self.scalars).shapes != layout.shapes:
            raise CodecMismatchError(
                f"Expected a layout of {self.vectors} vectors of {inner.dim:,} numbers and {self.scalars} numbers but got one of "
                f"{layout.dim:,}"
            )
        return inner

    def bind(self, layout: Layout, plan: Plan | None = None) -> Self:
        """Build encoder and decoder around those of the inner codec, and keep its tensors if it is fitted."""
        fitted = (self.codec.encoder.state_dict(), self.codec.decoder.state_dict()) if plan is None and self.codec.layout else None
        super().bind(layout, plan)
        encoder, decoder = self.encoder, self.decoder
        assert isinstance(encoder, StackedEncoder)
        assert isinstance(decoder, StackedDecoder)
        if fitted is not None:
            encoder.inner.load_state_dict(fitted[0])
            decoder.inner.load_state_dict(fitted[1])
        codec = self.codec
        codec.layout, codec.plan = Layout.from_json(self.plan["layout"]), self.plan["plan"]
        codec.version, codec.encoder, codec.decoder = self.plan["version"], encoder.inner, decoder.inner
        self.update_digest()
        return self

    def references(self) -> dict[str, Codec]:
        """Return the inner codec's references, stacked in the same way."""
        return {name: StackedCodec(codec, self.vectors, self.scalars) for name, codec in self.codec.references().items()}

    def fit(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Fit the inner codec to the first vectors of the uploads, then build encoder and decoder around it."""
        inner = bank.layout.unstacked(self.vectors, self.scalars)
        metrics = self.codec.fit(bank.map(torch.stack([uploads[:, : inner.dim] for uploads in bank]), inner), train)
        self.version += 1
        self.bind(bank.layout)
        return metrics
