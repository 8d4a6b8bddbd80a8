"""The global model as a code: clients download what was added to one sum since they were here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlight.clients.algorithms import Algorithm
from fedlight.core.codec import Codec, Context, exactly
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.model import Model
from fedlight.core.packing import as_bytes, as_tensor
from fedlight.core.running_sum import RunningSum
from fedlight.rounds.coded import change_of, coded_weights, levels_of, unit_exponent, write_change
from fedlight.rounds.downlink import CatchUp, Current, GlobalModel, Sums

FINEST = 24
"""Binary digits by which the unit of a sum may become finer than it was at first: float64 then holds all that it adds up to."""

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class Chapter:
    """The sum of all rounds of one version of the codec.

    Attributes:
        version: the codec's version.
        fingerprint: the codec's fingerprint.
        levels: what is public of the spread of its codes' entries.
        start: server steps in the model that the sum builds on.
        total: the sum so far, float64 ``[code_dim]``.
        coarsest: exponent of the first round's unit; None before a round that moved something.
        exponent: that of the finest unit so far, of which the sum's entries are multiples.
        changes: what single rounds added, by round: integers ``[code_dim]`` of the narrowest type, and the exponent of their unit.
    """

    version: int
    fingerprint: int
    levels: bytes
    start: int
    total: Tensor
    coarsest: int | None = None
    exponent: int = 0
    changes: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, number: int, step: Tensor, error: float) -> Tensor:
        """Add a round's step ``[code_dim]``, rounded to a unit that suits its size, and return what was added, float64."""
        exponent = unit_exponent(step, error)
        if exponent is None:
            exponent, step = self.exponent, torch.zeros_like(step)
        elif self.coarsest is None:
            self.coarsest = self.exponent = exponent
        exponent = max(exponent, (exponent if self.coarsest is None else self.coarsest) - FINEST)
        self.exponent = min(self.exponent, exponent)
        change = change_of((step.double().cpu() * 2.0**-exponent).round() * 2.0**exponent, exponent, number, number + 1)
        self.changes[number] = _narrow(change.values), change.exponent
        self.total = self.total + change.amount
        return change.amount

    def message(self, since: int, until: int) -> tuple[int, bytes]:
        """Return what was added from a round on, or in all if no more is known of that round, with the version."""
        missed = range(since, until)
        if since == self.start or any(number not in self.changes for number in missed):
            since, amount = self.start, self.total
        else:
            amount = torch.zeros_like(self.total)
            for number in missed:
                values, exponent = self.changes[number]
                amount += values.double() * 2.0**exponent
        return self.version, write_change(change_of(amount, self.exponent, since, until), self.levels, self.fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain data and tensors."""
        plain = {name: getattr(self, name) for name in ("version", "fingerprint", "start", "total", "coarsest", "exponent")}
        return plain | {"levels": as_tensor(self.levels), "changes": dict(self.changes)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Chapter:
        """Return the chapter that ``state_dict`` described."""
        return cls(**{**state, "levels": as_bytes(state["levels"]), "changes": dict(state["changes"])})


def _narrow(values: Tensor) -> Tensor:
    """Return integers in the narrowest type that holds them."""
    most = int(values.abs().max()) if len(values) else 0
    return values.to(next(dtype for dtype in _INTEGERS if most <= torch.iinfo(dtype).max))


class CodedModel(CatchUp):
    """The global model is a base minus what one sum of integers decodes to, and a client downloads what was added to the sum.

    Decoding is linear, so however many rounds a client missed, they are one message of entropy-coded integers: a few kilobytes where
    `CatchUp` sends every round's sum. A newcomer needs the seed of the initial weights, the encoder and the sum. Whenever the codec is
    fitted anew the current weights become the next base.

    The server takes its step as it likes, with any optimizer and algorithm. What of that step the codec can express is then rounded to
    a unit that the step's own size gives (a power of two), and what rounding takes away is added to the next round's step. What the
    codec cannot express is left out: with plain SGD that is nothing.

    Args:
        drawn: Whether the initial model is drawn from the seed. False for trained weights: the first download is then the model.
        error: The share of a round's step that rounding may take away, as energy; less makes downloads longer.

    Raises:
        ConfigurationError: if the error is not between 0 and 1.
    """

    def __init__(self, drawn: bool = True, error: float = 0.05) -> None:
        super().__init__(drawn)
        require(0 < error < 1, f"Expected `error` between 0 and 1 but got {error}")
        self.error = error
        self.chapters: list[Chapter] = []  # by version; the last is the one that is written
        self.base = torch.empty(0)  # that the last chapter builds on
        self.left = torch.empty(0)  # what rounding took away so far, as a step ``[dim]``

    def check(self, codec: Codec, algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:
        """Refuse codecs whose sums are no steps of the model."""
        if not codec.decoder.linear_map or codec.passes > 1:
            raise ConfigurationError(
                f"Expected a codec whose decoder is one linear map in all rounds but {type(codec).__name__} has another: set "
                "`model.downlink` to CatchUp or FullModel, or choose TransformCodec, TwoSidedCodec or LinearCodec"
            )
        weights = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        if codec.decoder.dim != weights:
            raise ConfigurationError(
                f"Expected an `algorithm` whose clients upload one update of {weights:,} numbers but those of {type(algorithm).__name__} "
                f"upload {codec.decoder.dim:,}: set `model.downlink` to FullModel"
            )

    def reset(self, drawn: bool = True) -> None:
        """Begin a run in which nobody has downloaded anything."""
        super().reset(drawn)
        self.chapters, self.base, self.left = [], torch.empty(0), torch.empty(0)

    def _open(self, current: Current) -> Chapter:
        """Return the chapter of the current codec: a new one if it was fitted since the last round."""
        if not self.chapters or self.chapters[-1].version != current.version:
            decoder = current.codec.decoder
            total = torch.zeros(decoder.code_dim, dtype=torch.float64)
            self.chapters.append(Chapter(current.version, decoder.fingerprint, levels_of(decoder.format), current.round, total))
            self.base = current.model.weights.clone()
        return self.chapters[-1]

    def _whole(self, current: Current) -> tuple[int, Sums, Model]:
        """Return the last base and the sum that follows it."""
        chapter = self._open(current)
        sums = (chapter.message(chapter.start, current.round),) if chapter.start < current.round else ()
        return chapter.start, sums, Model(self.base, current.model.buffers, current.model.extras)

    def _missed(self, held: int, current: Current) -> Sums | None:
        """Return what was added to the sums of all versions since a client was here."""
        self._open(current)
        if held < self.chapters[0].start:
            return None
        ends = [*(chapter.start for chapter in self.chapters[1:]), current.round]
        spans = [(chapter, max(held, chapter.start), end) for chapter, end in zip(self.chapters, ends, strict=True)]
        return tuple(chapter.message(since, end) for chapter, since, end in spans if since < end)

    def finished(self, current: Current, context: Context, codes: RunningSum, lr: float, model: GlobalModel) -> None:
        """Put the model where its sum says it is, and forget what hardly anybody can still want."""
        chapter, decoder, after = self._open(current), current.codec.decoder, model.read().weights
        with exactly(after.device):
            left = self.left.to(after) if len(self.left) else torch.zeros_like(after)
            step = decoder.coordinates(current.model.weights.to(after) - after + left)
            taken = chapter.add(context.round, step, self.error)
            self.left = decoder.decode(step - taken.to(step), Context(), {}).to(after)
        model.write(coded_weights(self.base.to(after), chapter.total, decoder))
        self._prune(len(after))

    def _prune(self, dim: int) -> None:
        """Forget versions whose successors' encoders are longer than the model, and the oldest rounds beyond twice the model's bytes."""
        newer = [sum(map(len, self.files.get(chapter.version, (b"",)))) for chapter in self.chapters[1:]]
        while len(self.chapters) > 1 and sum(newer[:-1]) > 4 * dim:
            del self.chapters[0], newer[0]
        self.files = {v: pair for v, pair in self.files.items() if v in {chapter.version for chapter in self.chapters}}
        room = 8 * dim
        for chapter in reversed(self.chapters):
            for number in sorted(chapter.changes, reverse=True):
                values, _ = chapter.changes[number]
                room -= values.numel() * values.element_size()
                if room < 0:
                    del chapter.changes[number]

    def state_dict(self) -> dict[str, Any]:
        """Return what every client holds, and what they may still need."""
        own = {"chapters": [chapter.state_dict() for chapter in self.chapters], "base": self.base.cpu(), "left": self.left.cpu()}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.chapters = [Chapter.of(chapter) for chapter in state["chapters"]]
        self.base, self.left = state["base"], state["left"]
