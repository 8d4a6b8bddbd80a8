"""What clients hold between rounds: the model that they ended with, and the codecs that they downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedlight.core.codec import Codec, Decoder, Encoder
from fedlight.core.errors import CodecMismatchError, MessageError
from fedlight.core.export import load_replaying
from fedlight.core.model import Model
from fedlight.core.packing import as_bytes, as_tensor, pack, unpack
from fedlight.rounds.coded import coded_weights, is_change, levels_of, read_change
from fedlight.rounds.messages import Download
from fedlight.rounds.sums import apply_sum


class Lacks(MessageError):
    """A download builds on something that the client does not hold."""


@dataclass(frozen=True)
class Held:
    """A global model that a client holds: weights and buffers, and where they are a code, what they are made of.

    Attributes:
        round: server steps in the model.
        model: the model; of a code the base, with the buffers of the model.
        start: server steps in the base.
        version: version of the decoder that the code is decoded with.
        total: the code ``[code_dim]``; None if the model is the base itself.
    """

    round: int
    model: Model
    start: int = 0
    version: int = 0
    total: Tensor | None = None


class HeldModels:
    """Turns a client's download into the model before the round and the current encoder.

    A client in the server's process is handed both and nothing is kept. Any other keeps what later downloads build on: the model that it
    ended with and every codec that it downloaded; files of codecs that several clients downloaded are read once.

    Args:
        codec: the codec as it is configured, which nobody downloads.
        initial: the initial model, which every client draws from the seed; None if it cannot.
    """

    def __init__(self, codec: Codec, initial: Model | None = None) -> None:
        self.codec = codec
        self.initial = initial
        self._models: dict[int, Held] = {}
        self._versions: dict[int, set[int]] = {}  # of codecs whose encoder a client has
        self._replayable: dict[int, set[int]] = {}  # of codecs whose decoder it has as well
        self._encoders: dict[int, Encoder] = {}
        self._decoders: dict[int, Decoder] = {}
        self._files: dict[int, list[bytes]] = {}  # what both were read from
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Have models and codecs on the device that clients train on, those downloaded later as well."""
        self._device = device
        if self.codec.bound:  # else every encoder is downloaded
            self.codec.to(device)
        for part in (*self._encoders.values(), *self._decoders.values()):
            part.to(device)

    def take(self, client: int, download: Download) -> tuple[Model, Encoder]:
        """Return the model and the encoder that a client holds after its download.

        Raises:
            Lacks: if the download builds on a model or a codec that the client does not hold.
            MessageError: if it is damaged.
        """
        if download.result is not None:
            return download.result, self.codec.encoder
        self._take_codecs(client, download)
        if download.version and download.version not in self._versions.get(client, ()):
            raise Lacks(f"it lacks version {download.version} of the encoder")
        held = self._caught_up(client, download, self._start(client, download))
        if download.keep:
            self._models[client] = held
        return self.model(held), self.encoder(download.version)

    def _start(self, client: int, download: Download) -> Held:
        """Return the model that the sums of a download follow."""
        if download.model is not None:
            return Held(download.since if download.sums else download.round, self._here(download.model), download.since)
        held = self._models.get(client)
        if held is None and self.initial is None:
            raise Lacks("it holds no model")
        held = held or Held(0, cast(Model, self.initial))
        if held.round != download.since:
            raise Lacks(f"it holds the model after {held.round} rounds and not after {download.since}")
        return replace(held, model=self._here(held.model))

    def _here(self, model: Model) -> Model:
        """Return a model on the device that clients train on."""
        if model.weights.device == self._device:
            return model
        return replace(model, weights=model.weights.to(self._device), buffers=model.buffers.to(self._device))

    def _caught_up(self, client: int, download: Download, held: Held) -> Held:
        """Return the model after the server's steps that the client missed."""
        for version, message in download.sums:
            if version and version not in self._replayable.get(client, ()):
                raise Lacks(f"it lacks version {version} of the decoder")
            held = self._coded(held, version, message) if is_change(message) else self._replayed(held, version, message)
        if held.round != download.round:
            raise MessageError(f"Expected sums up to round {download.round} but they end at {held.round}")
        if download.sums and download.model is None:
            held = replace(held, model=Model(held.model.weights, download.buffers, download.extras))
        return held

    def _replayed(self, held: Held, version: int, message: bytes) -> Held:
        """Take one round's step."""
        model = self.model(held)
        weights = model.weights.clone()
        apply_sum(weights, message, self._decoder(version), held.round)
        return Held(held.round + 1, Model(weights, model.buffers, model.extras))

    def _coded(self, held: Held, version: int, message: bytes) -> Held:
        """Add a change to the code, or begin a new one at the model that is held."""
        decoder = self._decoder(version)
        change = read_change(message, levels_of(decoder.format), decoder.fingerprint)
        same = held.total is not None and held.version == version
        if same and change.since in (held.round, held.start):
            assert held.total is not None
            total = change.amount + (held.total if change.since == held.round else 0)
            return replace(held, round=change.until, total=total)
        if change.since != held.round:
            raise Lacks(f"it holds the model after {held.round} rounds and not after {change.since}")
        return Held(change.until, self.model(held), held.round, version, change.amount)

    def model(self, held: Held) -> Model:
        """Return a model's weights and buffers."""
        if held.total is None:
            return held.model
        return Model(coded_weights(held.model.weights, held.total, self._decoder(held.version)), held.model.buffers, held.model.extras)

    def _decoder(self, version: int) -> Decoder:
        return self._decoders[version] if version else self.codec.decoder

    def _take_codecs(self, client: int, download: Download) -> None:
        for version, data in download.encoders:
            if version not in self._encoders:
                self._read(version, data)
            self._versions.setdefault(client, set()).add(version)
        for version, data in download.decoders:
            if version not in self._decoders:
                raise Lacks(f"it lacks version {version} of the encoder")
            write_decoder(self._decoders[version], data)
            self._files[version][1:] = [data]
            self._replayable.setdefault(client, set()).add(version)

    def _read(self, version: int, data: bytes) -> None:
        encoder, decoder = read_codec(data)
        self._encoders[version], self._decoders[version] = encoder.to(self._device), decoder.to(self._device)
        self._files[version] = [data]

    def encoder(self, version: int) -> Encoder:
        """Return an encoder that was downloaded, or for version 0 the one that nobody downloads."""
        return self._encoders[version] if version else self.codec.encoder

    def version_of(self, encoder: Encoder) -> int:
        """Return the version of an encoder."""
        return next((version for version, own in self._encoders.items() if own is encoder), 0)

    def forget(self, client: int) -> None:
        """Forget all that a client held."""
        for held in (self._models, self._versions, self._replayable):
            held.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Return all that clients hold, for a checkpoint of a simulation."""
        return {
            "initial": None if self.initial is None else _plain(self.initial),
            "models": {client: {**vars(held), "model": _plain(held.model)} for client, held in self._models.items()},
            "versions": {client: sorted(versions) for client, versions in self._versions.items()},
            "replayable": {client: sorted(versions) for client, versions in self._replayable.items()},
            "files": {version: [as_tensor(data) for data in files] for version, files in self._files.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything."""
        self.initial = None if state["initial"] is None else Model(*state["initial"])
        self._models = {client: Held(**{**held, "model": Model(*held["model"])}) for client, held in state["models"].items()}
        self._versions = {client: set(versions) for client, versions in state["versions"].items()}
        self._replayable = {client: set(versions) for client, versions in state["replayable"].items()}
        self._encoders, self._decoders, self._files = {}, {}, {}
        for version, files in state["files"].items():
            first, *rest = map(as_bytes, files)
            self._read(version, first)
            for data in rest:
                write_decoder(self._decoders[version], data)
                self._files[version].append(data)


def _plain(model: Model) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return model.weights.cpu(), model.buffers.cpu(), {name: tensor.cpu() for name, tensor in model.extras.items()}


def beyond_encoder(codec: Codec) -> bytes:
    """Return the decoder's tensors that the encoder's file does not hold already."""
    known = codec.encoder.state_dict()

    def same(name: str, tensor: Tensor) -> bool:
        return name in known and known[name].shape == tensor.shape and bool((known[name] == tensor).all())

    return pack({name: tensor for name, tensor in codec.decoder.state_dict().items() if not same(name, tensor)})


def write_decoder(decoder: Decoder, data: bytes) -> None:
    """Give a decoder what ``beyond_encoder`` returned; raises ``MessageError`` if it is not of this decoder."""
    tensors, own = unpack(data), decoder.state_dict()
    if not isinstance(tensors, dict) or any(name not in own or own[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise MessageError(f"Expected tensors of a {type(decoder).__name__} but got others")
    decoder.load_state_dict(own | tensors)


def read_codec(data: bytes) -> tuple[Encoder, Decoder]:
    """Return the encoder that a file holds, and its decoder as far as the encoder's tensors tell.

    Raises:
        MessageError: if the file is no encoder, or not what its digest says.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.safetensors"
        path.write_bytes(data)
        try:
            return load_replaying(path)
        except CodecMismatchError as error:
            raise MessageError(f"Expected an encoder in the download but {error}") from error
