"""Codecs as plain data: descriptions back to codecs, halves as safetensors files, state for a checkpoint."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedlight.core.codec import Codec, Decoder, Encoder, codec_digest
from fedlight.core.errors import CodecMismatchError
from fedlight.core.layout import Layout

ENCODER_FILE = "encoder.safetensors"
DECODER_FILE = "decoder.safetensors"

_AGAIN = "export the codec again"


def codec_from_config(config: dict[str, Any]) -> Codec:
    """Return a new codec from what ``Codec.config`` returned.

    Raises:
        CodecMismatchError: if the class path does not name a codec that can be imported, or the arguments are not its own.
    """
    path = config["class_path"]
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CodecMismatchError(f"Expected the class path of a codec but got {path!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Codec)):
        raise CodecMismatchError(f"Expected the class path of a codec but {path!r} is not one")
    arguments = {key: _revive(value) for key, value in config["init_args"].items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise CodecMismatchError(f"Expected arguments of {path} but got {sorted(arguments)}: {error}") from error


def _revive(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"class_path", "init_args"}:
        return codec_from_config(value)
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return value


def codec_state(codec: Codec) -> dict[str, Any]:
    """Return a bound codec as plain data and tensors, for a checkpoint or a broadcast."""
    return {
        "description": json.dumps(codec.describe()),
        "encoder": {k: v.detach().cpu() for k, v in codec.encoder.state_dict().items()},
        "decoder": {k: v.detach().cpu() for k, v in codec.decoder.state_dict().items()},
    }


def restore_codec(codec: Codec, state: dict[str, Any]) -> None:
    """Load what ``codec_state`` returned into a codec of the same configuration.

    Raises:
        CodecMismatchError: if the state belongs to a codec of another configuration.
    """
    description = json.loads(state["description"])
    if description["config"] != codec.config():
        raise CodecMismatchError(
            f"Expected the checkpoint's codec {json.dumps(description['config'])} but the configuration says "
            f"{json.dumps(codec.config())}: resume with the configuration of that run, or start a new one"
        )
    _rebuild(codec, description, state["encoder"], state["decoder"])


def _rebuild(codec: Codec, description: dict[str, Any], encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> None:
    codec.version = description["version"]
    codec.bind(Layout.from_json(description["layout"]), description["plan"])
    codec.encoder.load_state_dict(encoder)
    codec.decoder.load_state_dict(decoder)
    codec.update_digest()


def save_codec(codec: Codec, folder: Path) -> None:
    """Write ``encoder.safetensors`` and ``decoder.safetensors``, each complete without the other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENCODER_FILE).write_bytes(_serialise(codec, "encoder"))
    (folder / DECODER_FILE).write_bytes(_serialise(codec, "decoder"))


def encoder_file(codec: Codec) -> bytes:
    """Return the client's half as a file, which is what clients download."""
    return _serialise(codec, "encoder")


def _serialise(codec: Codec, half: Literal["encoder", "decoder"]) -> bytes:
    description = json.dumps(codec.describe())
    module = codec.encoder if half == "encoder" else codec.decoder
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    return save(tensors, {"half": half, "codec": description, "digest": module.digest.hex()})


def load_encoder(path: Path) -> Encoder:
    """Read the client's half from ``encoder.safetensors``: all that a client needs.

    Raises:
        CodecMismatchError: if the file is missing, is not an exported encoder, or is not what its digest says.
    """
    description, digest, tensors = _read(path, "encoder")
    codec = codec_from_config(description["config"])
    codec.version = description["version"]
    encoder = codec.make_encoder(Layout.from_json(description["layout"]), description["plan"])
    encoder.load_state_dict(tensors)
    # A client trusts what it holds, not what the file says of itself.
    encoder.digest = codec_digest(description, encoder)
    if encoder.digest.hex() != digest:
        raise CodecMismatchError(
            f"Expected the encoder at {path} to have the digest that it was exported with but it has another: {_AGAIN}"
        )
    return encoder


def load_decoder(path: Path) -> Decoder:
    """Read the server's half from ``decoder.safetensors``: all that a server needs.

    Raises:
        CodecMismatchError: if the file is missing or is not an exported decoder.
    """
    description, digest, tensors = _read(path, "decoder")
    codec = codec_from_config(description["config"])
    codec.version = description["version"]
    decoder = codec.make_decoder(Layout.from_json(description["layout"]), description["plan"])
    decoder.load_state_dict(tensors)
    decoder.digest = bytes.fromhex(digest)
    return decoder


def load_codec(folder: Path) -> Codec:
    """Read both halves from a folder that ``save_codec`` wrote.

    Raises:
        CodecMismatchError: if a file is missing, or the two files belong to different codecs.
    """
    first, digest, encoder = _read(folder / ENCODER_FILE, "encoder")
    second, other, decoder = _read(folder / DECODER_FILE, "decoder")
    if first != second or digest != other:
        raise CodecMismatchError(f"{folder}: encoder and decoder belong to different codecs or versions; export both again")
    codec = codec_from_config(first["config"])
    _rebuild(codec, first, encoder, decoder)
    return codec


def _read(path: Path, half: str) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """Return the codec's description and digest, and the half's tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise CodecMismatchError(f"Expected an exported codec at {path} but could not read it: {error}") from error
    if not {"codec", "digest"} <= set(metadata):
        raise CodecMismatchError(f"Expected an exported codec at {path} but the file has no codec description with a digest: {_AGAIN}")
    if metadata.get("half") != half:
        raise CodecMismatchError(f"Expected an exported {half} at {path} but the file holds the codec's {metadata.get('half')}")
    return json.loads(metadata["codec"]), metadata["digest"], tensors
