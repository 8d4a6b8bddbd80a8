"""What clients download before a round: the whole model, or the sums of the rounds that they missed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlight.clients.algorithms import Algorithm
from fedlight.core.codec import Codec, Context
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import encoder_file
from fedlight.core.model import Model
from fedlight.core.packing import as_bytes, as_tensor
from fedlight.core.running_sum import RunningSum
from fedlight.rounds.held import beyond_encoder
from fedlight.rounds.messages import Download
from fedlight.rounds.sums import write_sum

Sums = tuple[tuple[int, bytes], ...]
"""Messages of sums, each with the version of its codec."""


class GlobalModel(Protocol):
    """The global model and its optimizer, wherever they live."""

    @property
    def device(self) -> torch.device:
        """Where sums are decoded."""

    def read(self) -> Model:
        """Return the current weights and buffers."""

    def extras(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return what else training changed, by name (``fedlight.core.buffers``)."""

    def step(self, update: Tensor, buffers: Tensor | None, extras: Mapping[str, Tensor] = {}) -> float:
        """Take one optimizer step with an update ``[dim]`` for a gradient, set buffers and extras, return the step's learning rate."""

    def write(self, weights: Tensor) -> None:
        """Replace the weights ``[dim]``."""


@dataclass
class Current:
    """What every client of an attempt has to hold: the model after ``round`` server steps, and the codec."""

    round: int
    model: Model
    codec: Codec
    made: dict[Any, Download] = field(default_factory=dict)  # downloads by what makes them differ

    @property
    def version(self) -> int:
        """The version of the codec; 0 for one that nobody downloads."""
        return self.codec.version


class Downlink(ABC):
    """Makes the download of each client of a cohort.

    The server remembers what it sent. A client that turns out to hold something else says so (``LACKS``) and is forgotten here, so that
    its next download builds on nothing.
    """

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}  # of the encoder that each client holds
        self._file: tuple[int, bytes] = (0, b"")  # the current encoder, written once

    def check(self, codec: Codec, algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse, with a ``ConfigurationError``, a run whose clients could not come by the model this way."""

    def reset(self, drawn: bool = True) -> None:
        """Begin a run in which nobody has downloaded anything; ``drawn`` says whether the seed gives everybody the initial model."""
        self.versions = {}
        self._file = (0, b"")

    @abstractmethod
    def download(self, client: int, current: Current) -> Download:
        """Return what a client needs to hold the current model and encoder, and note that it holds them now."""

    def forget(self, client: int) -> None:
        """Take note that a client does not hold what was sent."""
        self.versions.pop(client, None)

    def finished(self, current: Current, context: Context, codes: RunningSum, lr: float, model: GlobalModel) -> None:  # noqa: B027
        """Take note of a round that succeeded: where it began, its sum, the learning rate of the server's step, the model after it.

        The model may be moved to where clients can follow.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what the server remembers of its clients."""
        return {"versions": dict(self.versions)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.versions = dict(state["versions"])

    def encoder(self, codec: Codec) -> bytes:
        """Return the current encoder's file."""
        if self._file[0] != codec.version:
            self._file = (codec.version, encoder_file(codec))
        return self._file[1]


class FullModel(Downlink):
    """Every client of a cohort downloads the whole model as float32, and the encoder if it lacks the current version."""

    def download(self, client: int, current: Current) -> Download:
        """Return the model, with the encoder for a client that lacks it."""
        lacks = self.versions.get(client, 0) < current.version
        if lacks not in current.made:
            encoders = ((current.version, self.encoder(current.codec)),) if lacks else ()
            current.made[lacks] = Download(
                current.round, model=current.model, encoders=encoders, version=current.version, result=current.model
            )
        self.versions[client] = current.version
        return current.made[lacks]


class CatchUp(Downlink):
    """A client downloads the summed codes of the rounds it missed instead of the model, whenever that is shorter.

    The initial model is a seed, so a client that holds nothing yet has missed every round so far. To take a round's step itself a client
    needs the codec of that round: the encoder, and what the decoder has beyond it, are sent where it lacks them. A client that
    downloads the model needs the current encoder alone, so nobody downloads more than with FullModel. BatchNorm statistics are sent as
    they are, except to clients that missed no round. Exact for codecs whose decoding depends only on the code and the broadcast, and for
    plain SGD at the server: the client ends with the server's model (``fedlight.rounds.sums.apply_sum``).

    Args:
        drawn: Whether the initial model is drawn from the seed. False for trained weights: the first download is then the model.
    """

    def __init__(self, drawn: bool = True) -> None:
        super().__init__()
        self.drawn = drawn
        self._nothing = 0 if drawn else -1  # server steps in the model of a client that has downloaded nothing
        self.held: dict[int, int] = {}  # server steps in the model that each client holds
        self.decoders: dict[int, int] = {}  # version of the decoder that each client holds
        self.sums: dict[int, tuple[int, bytes]] = {}  # of every round that somebody may still replay: codec version, message
        self.files: dict[int, tuple[bytes, bytes]] = {}  # by version: encoder, what the decoder has beyond it

    def check(self, codec: Codec, algorithm: Algorithm, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what clients could not repeat from sums alone."""
        if not codec.additive or codec.passes > 1 or not codec.decoder.replayable:
            raise ConfigurationError(
                f"Expected a codec whose sum alone gives the aggregate but {type(codec).__name__} needs more than that: "
                "set `model.downlink` to FullModel"
            )
        if not algorithm.replayable:
            raise ConfigurationError(
                f"Expected an `algorithm` whose server takes the mean update as it is but got {type(algorithm).__name__}, whose "
                "steps clients cannot take from sums alone: set `model.downlink` to FullModel"
            )
        plain = type(optimizer) is torch.optim.SGD and not any(
            group[name] for group in optimizer.param_groups for name in ("momentum", "weight_decay", "nesterov", "maximize")
        )
        if not plain or len(optimizer.param_groups) > 1:
            raise ConfigurationError(
                f"Expected plain SGD of one learning rate as `model.server_optimizer` but got {type(optimizer).__name__} with memory, "
                "decay or groups of its own, whose steps clients cannot take from sums alone: set `model.downlink` to FullModel"
            )

    def reset(self, drawn: bool = True) -> None:
        """Begin a run in which nobody has downloaded anything."""
        super().reset()
        self._nothing = 0 if drawn and self.drawn else -1
        self.held, self.decoders, self.sums, self.files = {}, {}, {}, {}

    def download(self, client: int, current: Current) -> Download:
        """Return the shorter of the two ways."""
        held, decoder = self.held.get(client, self._nothing), self.decoders.get(client, 0)
        version = self.versions.get(client, 0)
        key = (held, version, decoder)
        if key not in current.made:
            current.made[key] = self._shorter(held, version, decoder, current)
        found = current.made[key]
        self.held[client], self.versions[client] = current.round, current.version
        self.decoders[client] = max((of_version for of_version, _ in found.decoders), default=decoder)
        return found

    def _shorter(self, held: int, version: int, decoder: int, current: Current) -> Download:
        if current.version and current.version not in self.files:
            self.files[current.version] = self.encoder(current.codec), beyond_encoder(current.codec)
        whole = self._download(*self._whole(current), version, decoder, current)
        missed = self._missed(held, current)
        if missed is None:
            return whole
        by_sums = self._download(held, missed, None, version, decoder, current)
        return by_sums if by_sums.nbytes <= whole.nbytes else whole

    def _download(self, since: int, sums: Sums, start: Model | None, version: int, decoder: int, current: Current) -> Download:
        """Return a download of sums, with what takes them and the encoder to go on with, where a client lacks that."""
        replayed = sorted({of_version for of_version, _ in sums} - {0})
        needed = sorted({*replayed, current.version} - {0})
        buffers = current.model.buffers
        return Download(
            current.round,
            since=since,
            model=start,
            sums=sums,
            encoders=tuple((v, self.files[v][0]) for v in needed if v > version),
            decoders=tuple((v, self.files[v][1]) for v in replayed if v > decoder),
            buffers=buffers if sums and start is None else buffers[:0],
            extras=current.model.extras if sums and start is None else {},
            version=current.version,
            keep=True,
            result=current.model,
        )

    def _whole(self, current: Current) -> tuple[int, Sums, Model]:
        """Return what a client that holds nothing downloads: (server steps in a model, sums that follow it, that model)."""
        return 0, (), current.model

    def _missed(self, held: int, current: Current) -> Sums | None:
        """Return the sums that follow the model after ``held`` server steps; None if they are not to be had."""
        missed = range(held, current.round)
        return None if any(number not in self.sums for number in missed) else tuple(self.sums[number] for number in missed)

    def forget(self, client: int) -> None:
        """Take note that a client holds nothing: its next download is the whole model."""
        super().forget(client)
        self.decoders.pop(client, None)
        self.held[client] = -1

    def finished(self, current: Current, context: Context, codes: RunningSum, lr: float, model: GlobalModel) -> None:
        """Keep the round's sum as a message, and forget the oldest sums, which are longer in total than any model and codec."""
        codec = current.codec
        self.sums[context.round] = codec.version, write_sum(codes, context, codec.encoder.fingerprint, lr)
        assert codec.layout is not None
        room = 8 * codec.layout.dim + sum(len(part) for pair in self.files.values() for part in pair)
        for number in sorted(self.sums, reverse=True):
            room -= len(self.sums[number][1])
            if room < 0:
                del self.sums[number]
        used = {version for version, _ in self.sums.values()} | {codec.version}
        self.files = {version: pair for version, pair in self.files.items() if version in used}

    def state_dict(self) -> dict[str, Any]:
        """Return what every client holds, and what they may still need."""
        sums = {number: (version, as_tensor(data)) for number, (version, data) in self.sums.items()}
        files = {version: (as_tensor(encoder), as_tensor(decoder)) for version, (encoder, decoder) in self.files.items()}
        held = {"nothing": self._nothing, "held": dict(self.held), "decoders": dict(self.decoders)}
        return super().state_dict() | held | {"sums": sums, "files": files}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._nothing = int(state["nothing"])
        self.held, self.decoders = dict(state["held"]), dict(state["decoders"])
        self.sums = {number: (version, as_bytes(data)) for number, (version, data) in state["sums"].items()}
        self.files = {version: (as_bytes(encoder), as_bytes(decoder)) for version, (encoder, decoder) in state["files"].items()}
