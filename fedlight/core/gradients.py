"""Data-parallel gradients as codes: each process encodes its own, codes are summed over processes, and every process decodes the sum.

With error feedback (Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2): what a code leaves out of a gradient is added to the next.
There is one codec for each parameter tensor, which does not depend on the grouping of tensors into messages. Needs no Lightning.

Float codes can be sent as one-byte integers, whose sums also fit a byte: processes first sum powers of their codes' peaks, which gives
a common unit for each tensor in which no code is clipped.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from fedlight.core.bank import UpdateBank
from fedlight.core.checkpoint import archive_comment
from fedlight.core.codec import Codec, Context, Private, ServerContext, State
from fedlight.core.collectives import Reduce, add_up, agree_on_units, in_units, outgoing
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.export import LIMIT, WORTH, codec_state, restore_codec
from fedlight.core.inflate import inflate
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator


class Channel:
    """The exchange of one parameter tensor between processes: its codec, its residual, and recent gradients to fit the codec to.

    Args:
        name: the parameter's name.
        shape: the parameter's shape.
        recipe: the codec to copy for this channel; None sends the gradient in full.
        feedback: whether to add what a code leaves out to the next gradient.
        seed: seed of all random numbers of encoders.
    """

    def __init__(self, name: str, shape: tuple[int, ...], recipe: Codec | None, feedback: bool, seed: int) -> None:
        self.name = name
        self.shape = shape
        self.seed = seed
        self.codec = _bound(recipe, Layout((name,), (shape,)))
        # Codecs with client state have their own feedback, but it does not cover the rounding of their codes to bytes.
        remembers = self.codec is not None and (self.codec.passes > 1 or self.codec.client_state)
        self.feedback = feedback and not remembers
        self.returns_rounding = feedback and remembers
        self.residual: Tensor | None = None
        self.server: State = {}
        self.private: State = {}
        self.recent: list[Tensor] = []

    @property
    def ready(self) -> bool:
        """Whether the channel has a usable codec."""
        return self.codec is not None and self.codec.fitted

    @property
    def coder(self) -> Codec:
        """The codec of a channel that has one."""
        assert self.codec is not None
        return self.codec

    def corrected(self, gradient: Tensor) -> Tensor:
        """Return the gradient (real, dense), flat ``[dim]`` in at least float32, plus what earlier codes left out."""
        flat = wide(gradient.detach().reshape(-1))
        return flat if self.residual is None else flat + self.residual.to(flat.device)

    def remember(self, corrected: Tensor, window: int) -> None:
        """Store a gradient ``[dim]`` among the last ``window`` ones, if the codec learns from them."""
        if window and self.codec is not None and self.codec.needs_fit and bool(torch.isfinite(corrected).all()):
            latest = corrected.to("cpu", torch.float32, copy=True)
            self.recent = [*self.recent[1 - window :], latest] if window > 1 else [latest]

    def fit(self) -> bytes:
        """Fit the codec to the recent gradients and return it as bytes for other processes."""
        if self.recent and any(bool(gradient.any()) for gradient in self.recent):
            layout = Layout((self.name,), (self.shape,))
            self.coder.to("cpu").fit(UpdateBank(torch.stack(self.recent).unsqueeze(1), layout), lambda *_: {})
        self.recent, self.server = [], {}
        return pack_codec(self.coder)

    def take_over(self, packed: bytes) -> None:
        """Load the codec that another process fitted."""
        unpack_codec(self.coder, packed)
        self.recent, self.server = [], {}

    def state(self) -> dict[str, Any]:
        """Return the state that this process needs to resume."""
        codec = codec_state(self.codec) if self.codec is not None else None
        residual = None if self.residual is None else self.residual.cpu()
        return {"codec": codec, "residual": residual, "server": self.server, "private": self.private, "recent": self.recent}

    def restore(self, state: dict[str, Any], mine: bool) -> None:
        """Resume from ``state``, without its residual if it belongs to another process (``mine`` false)."""
        if self.codec is not None and state["codec"] is not None:
            restore_codec(self.codec, state["codec"])
        self.server, self.recent = state["server"], state["recent"]
        if mine:
            self.residual, self.private = state["residual"], state["private"]


def exchange(
    channels: Sequence[Channel],
    gradients: Sequence[Tensor],
    step: int,
    rank: int,
    world: int,
    reduce: Reduce,
    plain: bool,
    window: int = 0,
    int8: bool = False,
) -> tuple[list[Tensor], int]:
    """Return the mean gradient of all processes for each channel, flat ``[dim]``, and the bytes that one process sent to sums.

    ``gradients`` are this process's own, real and dense; what is narrower than float32 is widened. ``plain`` sends them in
    full, plus their residuals. ``int8`` rounds float codes to bytes.
    Every process sees values that are not finite (if the codec's codes are floats), so that a loss scaler can react; residuals never
    keep them.
    """
    sources = [channel.corrected(gradient) for channel, gradient in zip(channels, gradients, strict=True)]
    for channel, source in zip(channels, sources, strict=True):
        channel.remember(source, window)
    coded = [k for k, channel in enumerate(channels) if channel.ready and not plain]
    full = [k for k in range(len(channels)) if k not in set(coded)]
    means: list[Tensor] = [source.clone() for source in sources]
    sent = add_up([means[k] for k in full], world, reduce)
    for k in full:
        remembers = channels[k].feedback or channels[k].residual is not None
        if remembers and bool(torch.isfinite(means[k].sum())):
            _leave(channels[k], sources[k], sources[k])
    found, more = _exchange_codes([channels[k] for k in coded], [sources[k] for k in coded], step, rank, world, reduce, int8)
    for k, mean in zip(coded, found, strict=True):
        means[k] = mean.to(sources[k])
    return means, sent + more


def _exchange_codes(
    channels: Sequence[Channel], sources: Sequence[Tensor], step: int, rank: int, world: int, reduce: Reduce, int8: bool
) -> tuple[list[Tensor], int]:
    """Return each channel's decoded sum of all processes' codes, after all passes, and the bytes sent to sums."""
    sent, passes = 0, max((channel.coder.passes for channel in channels), default=0)
    before = [(_as_it_was(channel.server), _as_it_was(channel.private), channel.residual) for channel in channels]
    replies: list[Tensor | None] = [None] * len(channels)
    for number in range(passes):
        publics = [_public(channel, step, number, world, reply) for channel, reply in zip(channels, replies, strict=True)]
        codes = [_encode(channel, source, rank, context) for channel, source, context in zip(channels, sources, publics, strict=True)]
        units, spent = agree_on_units(codes, world, reduce) if int8 else ([None] * len(codes), 0)
        formats = [channel.coder.encoder.format_at(number) for channel in channels]
        sums = [outgoing(code, format, world, unit) for code, format, unit in zip(codes, formats, units, strict=True)]
        if number == passes - 1:
            for channel, source, code, own, unit, context in zip(channels, sources, codes, sums, units, publics, strict=True):
                _keep_error(channel, source, code, own, unit, ServerContext.of(context, 1))
        sent += spent + add_up(sums, world, reduce)
        for k, (channel, total, unit, context) in enumerate(zip(channels, sums, units, publics, strict=True)):
            mean = total if total.is_floating_point() else in_units(total, unit) / world
            replies[k] = channel.coder.decoder.decode(mean, context, channel.server)
    for channel, reply, was in zip(channels, replies, before, strict=True):
        if reply is not None and not bool(torch.isfinite(reply.sum())):  # the same on every process
            channel.server, channel.private, channel.residual = was
    return [reply for reply in replies if reply is not None], sent


def wide(gradient: Tensor) -> Tensor:
    """Return a gradient in float32, or float64 if it is that."""
    return gradient if gradient.dtype == torch.float64 else gradient.float()


def pack_codec(codec: Codec) -> bytes:
    """Return a codec in few bytes: its description and tensors; the decoder's only where they differ from the encoder's."""
    state = codec_state(codec)
    both = {name: t for name, t in state["decoder"].items() if not (name in state["encoder"] and torch.equal(t, state["encoder"][name]))}
    stream = BytesIO()
    torch.save({**state, "decoder": both, "names": list(state["decoder"])}, stream)
    return zlib.compress(stream.getvalue())


def unpack_codec(codec: Codec, packed: bytes) -> None:
    """Load the output of ``pack_codec`` into the codec.

    Raises:
        CodecMismatchError: if it is something else, belongs to a codec of another configuration, or takes more memory than it is worth.
    """
    raw = inflate(packed, LIMIT + WORTH * len(packed))
    try:
        if archive_comment(BytesIO(raw), len(raw)) is None:
            raise CodecMismatchError("it is no archive, or a compressed one")
        state = torch.load(BytesIO(raw), weights_only=True)
        decoder = {name: state["decoder"].get(name, state["encoder"].get(name)) for name in state["names"]}
        restore_codec(codec, {**state, "decoder": decoder})
    except Exception as error:  # what damaged bytes say can fail in any way where it is followed
        raise CodecMismatchError(f"Expected a packed codec but could not take it over: {error}") from error


def _bound(recipe: Codec | None, layout: Layout) -> Codec | None:
    """Return a copy of the codec for one tensor, or None if a code would not be shorter than the tensor."""
    if recipe is None:
        return None
    codec = recipe.unbound()
    try:
        codec.bind(layout)
    except ConfigurationError:
        return None
    lengths = [codec.encoder.format_at(number).length for number in range(codec.passes)]
    return codec if codec.passes == 1 or sum(lengths) < layout.dim else None


def _public(channel: Channel, step: int, number: int, clients: float, reply: Tensor | None) -> Context:
    broadcast = dict(channel.coder.decoder.broadcast(channel.server))
    if reply is not None:
        broadcast["reply"] = reply
    return ServerContext(seed=channel.seed, round=step, step=number, broadcast=broadcast, clients=clients)


def _encode(channel: Channel, source: Tensor, rank: int, context: Context) -> Tensor:
    codec, finite = channel.coder.to(source.device), bool(torch.isfinite(source.sum()))
    if codec.integer and not finite:
        source = torch.zeros_like(source)
    generator = torch_generator(channel.seed, context.round, rank, channel.name, "encode", context.step)
    state = channel.private if finite else _as_it_was(channel.private)
    code = codec.encoder.encode(source.float(), context, Private(generator, state))
    return code if finite or codec.integer else torch.full_like(code, torch.nan)  # some encoders would hide it


def _keep_error(channel: Channel, source: Tensor, code: Tensor, own: Tensor, unit: Tensor | None, context: Context) -> None:
    """Store what this process's outgoing code ``own`` leaves out of the source, or of the code of a codec with client state."""

    def alone(code: Tensor) -> Tensor:
        return channel.coder.decoder.decode(code, context, _as_it_was(channel.server)).to(source)

    if channel.feedback:
        _leave(channel, source, alone(in_units(own, unit)))
    elif channel.returns_rounding and unit is not None:
        _leave(channel, alone(code), alone(in_units(own, unit)))
    elif channel.residual is not None:  # from a run with other settings: it was part of this source
        _leave(channel, source, source)


def _as_it_was(state: State) -> State:
    """Return the state with copied dictionaries; codecs replace tensors in them, and change none in place."""
    return {name: _as_it_was(value) if isinstance(value, dict) else value for name, value in state.items()}


def _leave(channel: Channel, source: Tensor, arrived: Tensor) -> None:
    """Store what did not arrive, if it is finite."""
    if bool(torch.isfinite(source.sum())) and bool(torch.isfinite(arrived.sum())):
        channel.residual = source - arrived
