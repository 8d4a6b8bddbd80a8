"""Chains of codecs: encode forward, decode in reverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, CodecPart, Context, Decoder, Encoder, Plan, Private, State, TrainCodec
from fedlight.core.errors import CodecMismatchError, ConfigurationError, require
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator

P = TypeVar("P", bound=CodecPart)


def _stage(context: Context, i: int) -> Context:
    return replace(context, broadcast=context.broadcast.get(str(i), {}))


class ChainHalf(CodecPart, Generic[P]):
    """What both halves share: the stages, and the format of messages, which is the last one's.

    Raises:
        CodecMismatchError: unless the first stage takes the update and every other one the code of the stage before.
    """

    def __init__(self, layout: Layout, stages: Sequence[P]) -> None:
        super().__init__(layout, stages[-1].format)
        self.stages = nn.ModuleList(stages)
        expected, taken = [layout.dim, *(stage.code_dim for stage in stages[:-1])], [stage.dim for stage in stages]
        if taken != expected:
            raise CodecMismatchError(f"Expected stages that take {expected} numbers, the codes of those before, but they take {taken}")

    def stage(self, i: int) -> P:
        """Return a stage's half."""
        return cast(P, self.stages[i])


class ChainEncoder(ChainHalf[Encoder], Encoder):
    """Applies the stages' encoders in order."""

    def common_step(self, context: Context) -> float | None:
        """Return the last stage's unit."""
        return self.stage(-1).common_step(_stage(context, len(self.stages) - 1))

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the last stage's code ``[..., code_dim]``."""
        for i in range(len(self.stages)):
            own = Private(private.generator, private.state.setdefault(str(i), {}))
            update = self.stage(i).encode(update, _stage(context, i), own)
        return update


class ChainDecoder(ChainHalf[Decoder], Decoder):
    """Applies the stages' decoders in reverse."""

    def __init__(self, layout: Layout, stages: Sequence[Decoder]) -> None:
        super().__init__(layout, stages)
        self.replayable = all(stage.replayable for stage in stages)
        self.linear_map = all(stage.linear_map for stage in stages)

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the first stage's aggregated update ``[..., dim]``."""
        for i in reversed(range(len(self.stages))):
            mean_code = self.stage(i).decode(mean_code, _stage(context, i), state.setdefault(str(i), {}))
        return mean_code

    def coordinates(self, update: Tensor) -> Tensor:
        """Return the coordinates of every stage's code in the next, the last one's ``[..., code_dim]``."""
        for i in range(len(self.stages)):
            update = self.stage(i).coordinates(update)
        return update

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return the first stage's bound for its mean code; inf if a later stage adds its own state."""
        first = self._first_code(mean_code, context)
        return math.inf if first is None else self.stage(0).norm_bound(first, _stage(context, 0))

    def observe(self, mean_code: Tensor, context: Context, aggregate: Tensor) -> Tensor:
        """Return what the first stage knows, if the sum alone determines its mean code."""
        first = self._first_code(mean_code, context)
        return aggregate if first is None else self.stage(0).observe(first, _stage(context, 0), aggregate)

    def _first_code(self, mean_code: Tensor, context: Context) -> Tensor | None:
        """Return the first stage's mean code, without a change to any state; None if a later stage adds its own."""
        if not all(self.stage(i).replayable for i in range(1, len(self.stages))):
            return None
        context = Context(context.seed, context.round, context.attempt, context.step, context.broadcast)
        for i in reversed(range(1, len(self.stages))):
            mean_code = self.stage(i).decode(mean_code, _stage(context, i), {})
        return mean_code

    def open(self, code: Tensor) -> Tensor:
        """Return the terms that the last stage adds up."""
        return self.stage(-1).open(code)

    def sum_length(self, step: int = 0) -> int:
        """Return the length of the terms that the last stage adds up."""
        return self.stage(-1).sum_length(step)

    def record_lengths(self, mean_bytes: float, state: State) -> None:
        """Tell the last stage, whose codes messages hold."""
        self.stage(-1).record_lengths(mean_bytes, state.setdefault(str(len(self.stages) - 1), {}))

    def broadcast(self, state: State) -> State:
        """Return every stage's broadcast under its number."""
        broadcast = {str(i): self.stage(i).broadcast(state.setdefault(str(i), {})) for i in range(len(self.stages))}
        return {key: value for key, value in broadcast.items() if value}


class ChainCodec(Codec):
    """Applies codecs in order: each encodes the code of the previous one.

    If the last codec's codes cannot be summed, the server adds up what it decodes: codes of the codec before it.

    Args:
        codecs: the codecs in order of encoding; all but the last must be summable with float codes, and each takes one pass.

    Raises:
        ConfigurationError: if the list is empty, or a codec before the last has several passes or integer codes.
    """

    def __init__(self, codecs: Sequence[Codec]) -> None:
        require(codecs, "Expected `codecs` to name at least one codec but got an empty list")
        for codec in codecs[:-1]:
            if not codec.additive or codec.integer:
                raise ConfigurationError(
                    f"Expected summable codecs with float codes before the last of a chain but got {type(codec).__name__}: put it last"
                )
        for codec in codecs:
            if codec.passes > 1:
                raise ConfigurationError(
                    f"Expected one-pass codecs in a chain but {type(codec).__name__} takes {codec.passes} passes: use it alone"
                )
        self.codecs, last = list(codecs), codecs[-1]
        self.additive, self.integer, self.fixed_width, self.most_clients = last.additive, last.integer, last.fixed_width, last.most_clients
        self.linear, self.unbiased = all(codec.linear for codec in codecs), all(codec.unbiased for codec in codecs)
        self.client_state = any(codec.client_state for codec in codecs)
        self.needs_fit, self.trained = any(codec.needs_fit for codec in codecs), any(codec.trained for codec in codecs)

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the stages' plans and versions; with a bank they are known only after each stage is fitted."""
        if bank is not None:
            return {"stages": []}
        plans = []
        for codec in self.codecs:
            codec.bind(layout)
            plans.append({"layout": layout.to_json(), "plan": codec.plan, "version": codec.version})
            layout = Layout.vector(codec.encoder.code_dim)
        return {"stages": plans}

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        stages = zip(self.codecs, plan["stages"], strict=True)
        return ChainEncoder(layout, [c.make_encoder(Layout.from_json(s["layout"]), s["plan"]) for c, s in stages])

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        stages = zip(self.codecs, plan["stages"], strict=True)
        return ChainDecoder(layout, [c.make_decoder(Layout.from_json(s["layout"]), s["plan"]) for c, s in stages])

    def bind(self, layout: Layout, plan: Plan | None = None) -> Self:
        """Build encoder and decoder, and bind every stage's codec to its share of them."""
        super().bind(layout, plan)
        if isinstance(self.encoder, ChainEncoder) and isinstance(self.decoder, ChainDecoder):
            for i, (codec, stage) in enumerate(zip(self.codecs, self.plan["stages"], strict=True)):
                codec.layout, codec.plan, codec.version = Layout.from_json(stage["layout"]), stage["plan"], stage["version"]
                codec.encoder, codec.decoder = self.encoder.stage(i), self.decoder.stage(i)
        return self

    def references(self) -> dict[str, Codec]:
        """Return the first stage's references, without the later stages."""
        return self.codecs[0].references()

    def fit(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Fit every stage to the codes of the stages before it, then assemble encoder and decoder."""
        metrics: dict[str, float] = {}
        plans, layout = [], bank.layout
        for i, codec in enumerate(self.codecs):
            metrics |= codec.fit(bank, train)
            plans.append({"layout": bank.layout.to_json(), "plan": codec.plan, "version": codec.version})
            if i == len(self.codecs) - 1:
                break
            with torch.no_grad():
                private = Private(torch_generator("chain fit"))
                codes = torch.empty(bank.rounds, bank.clients, codec.encoder.code_dim)
                for row, updates in zip(codes, bank, strict=True):
                    row.copy_(codec.encoder.encode(updates, Context(), private))
            bank = bank.map(codes, Layout.vector(codec.encoder.code_dim))
        self.version += 1
        encoders, decoders = [c.encoder for c in self.codecs], [c.decoder for c in self.codecs]
        self.bind(layout, {"stages": plans})
        for i, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
            self.codecs[i].encoder.load_state_dict(encoder.state_dict())
            self.codecs[i].decoder.load_state_dict(decoder.state_dict())
        self.update_digest()
        return metrics
