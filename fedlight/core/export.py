"""Codecs as plain data: descriptions back to codecs, halves as safetensors files, state for a checkpoint.

A file is somebody else's word until it is read: it is made whole or not at all, names no class but those that the process knows, and
costs no more memory than it is worth. Whatever is wrong with it is a ``CodecMismatchError``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedlight.core.budget import Budget
from fedlight.core.codec import Codec, CodecPart, Decoder, Encoder, codec_digest
from fedlight.core.digest import digest_tensors
from fedlight.core.errors import CodecMismatchError
from fedlight.core.files import replacing
from fedlight.core.layout import Layout

ENCODER_FILE = "encoder.safetensors"
DECODER_FILE = "decoder.safetensors"

LIMIT = 64 << 20
"""Bytes that a half may take beside 64 times its file's: for what is drawn from a seed and lies in no file."""
WORTH = 64

_AGAIN = "export the codec again"

_registered: dict[str, type[Codec]] = {}

C = TypeVar("C", bound=type[Codec])
P = TypeVar("P", bound=CodecPart)


def register_codec(cls: C) -> C:
    """Let files and descriptions name this class, as they can those of `fedlight.codecs`; usable as a decorator.

    A file is never a reason to import anything: a codec of your own is known once you have registered it.

    >>> from fedlight.codecs import IdentityCodec
    >>> @register_codec
    ... class MyCodec(IdentityCodec):
    ...     pass
    >>> type(codec_from_config(MyCodec().config())).__name__
    'MyCodec'
    """
    _registered[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def known_codecs() -> dict[str, type[Codec]]:
    """Return the classes that a description can name, by class path: those of `fedlight.codecs` and the registered ones."""
    package = importlib.import_module("fedlight.codecs")  # which imports this package in its turn
    known: dict[str, type[Codec]] = {}
    for name in package.__all__:
        cls = getattr(package, name)
        known |= {f"{package.__name__}.{name}": cls, f"{cls.__module__}.{cls.__qualname__}": cls}
    return known | _registered


def codec_from_config(config: dict[str, Any]) -> Codec:
    """Return a new codec from what ``Codec.config`` returned.

    Raises:
        CodecMismatchError: if the class path names no codec of `fedlight.codecs` and no registered one, or the arguments are not its own.
    """
    if not isinstance(config, dict) or not isinstance(config.get("class_path"), str) or not isinstance(config.get("init_args"), dict):
        raise CodecMismatchError(f"Expected a codec's `class_path` and `init_args` but got {config!r:.80}")
    path = config["class_path"]
    cls = known_codecs().get(path)
    if cls is None:
        raise CodecMismatchError(
            f"Expected the class path of a codec but {path!r} is none of `fedlight.codecs` and none that was registered: a codec of your "
            "own is known after fedlight.core.export.register_codec(...), which can decorate its class"
        )
    arguments = {key: _revive(value) for key, value in config["init_args"].items()}
    try:
        return cls(**arguments)
    except CodecMismatchError:
        raise
    except Exception as error:  # arguments of the wrong kind fail in whatever way they do
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
        CodecMismatchError: if the state belongs to a codec of another configuration, or asks for more memory than it is worth.
    """
    description = json.loads(state["description"])
    size = sum(tensor.nbytes for half in ("encoder", "decoder") for tensor in state[half].values())
    if description["config"] != codec.config():
        raise CodecMismatchError(
            f"Expected the checkpoint's codec {json.dumps(description['config'])} but the configuration says "
            f"{json.dumps(codec.config())}: resume with the configuration of that run, or start a new one"
        )
    with Budget(LIMIT + WORTH * size):
        codec.version = description["version"]
        codec.bind(Layout.from_json(description["layout"]), description["plan"])
        codec.encoder.load_state_dict(state["encoder"])
        codec.decoder.load_state_dict(state["decoder"])
        codec.update_digest()


def save_codec(codec: Codec, folder: Path) -> None:
    """Write ``encoder.safetensors`` and ``decoder.safetensors``, each complete without the other.

    What was there stays until both are written and synced; after an error it is as it was.
    """
    encoder, decoder = _serialise(codec, "encoder"), _serialise(codec, "decoder")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / DECODER_FILE) as second, replacing(folder / ENCODER_FILE) as first:
        first.write(encoder)
        second.write(decoder)


def encoder_file(codec: Codec) -> bytes:
    """Return the client's half as a file, which is what clients download."""
    return _serialise(codec, "encoder")


def _serialise(codec: Codec, half: Literal["encoder", "decoder"]) -> bytes:
    """Return a half's file. Its digest is the codec's, of the description and the encoder's tensors; a decoder's has one of its own too."""
    description = codec.describe()
    module: CodecPart = codec.encoder if half == "encoder" else codec.decoder
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    metadata = {"half": half, "codec": json.dumps(description), "digest": module.digest.hex()}
    if half == "decoder":
        metadata["own"] = _decoder_digest(description, metadata["digest"], tensors)
    return save(tensors, metadata)


def _decoder_digest(description: dict[str, Any], digest: str, tensors: dict[str, Tensor]) -> str:
    """Return the digest of all that a decoder's file holds, as hexadecimal digits."""
    return digest_tensors(dict(sorted(tensors.items())), "decoder", json.dumps(description, sort_keys=True), digest).hex()


def load_encoder(path: Path, limit: int = LIMIT) -> Encoder:
    """Read the client's half from ``encoder.safetensors``: all that a client needs.

    Args:
        path: the file.
        limit: bytes that the half may take beside 64 times those of the file.

    Raises:
        CodecMismatchError: if the file is missing, is not an exported encoder, asks for more memory or is not what its digest says.
    """
    with _sound(path, limit):
        description, digest, tensors = _read(path, "encoder", limit)
        codec, layout = _unbound(description)
        encoder = _load(codec.make_encoder(layout, description["plan"]), tensors)
        # A client trusts what it holds, not what the file says of itself.
        encoder.digest = codec_digest(description, encoder)
        _require_digest(path, "encoder", digest, encoder.digest.hex())
    return encoder


def load_replaying(path: Path, limit: int = LIMIT) -> tuple[Encoder, Decoder]:
    """Read the client's half from its file, and make of it the server's, whose further tensors are as they begin.

    Raises:
        CodecMismatchError: as ``load_encoder`` does, for the server's half too.
    """
    encoder = load_encoder(path, limit)
    with _sound(path, limit):
        description, _, shared = _read(path, "encoder", limit)
        codec, layout = _unbound(description)
        decoder = codec.make_decoder(layout, description["plan"])
        own = decoder.state_dict()
        decoder.load_state_dict({name: shared[name] if name in shared and shared[name].shape == t.shape else t for name, t in own.items()})
        decoder.digest = encoder.digest
    return encoder, decoder.requires_grad_(False)


def load_decoder(path: Path, limit: int = LIMIT) -> Decoder:
    """Read the server's half from ``decoder.safetensors``: all that a server needs.

    Args:
        path: the file.
        limit: as of ``load_encoder``.

    Raises:
        CodecMismatchError: as ``load_encoder`` does.
    """
    with _sound(path, limit):
        description, digest, tensors = _read(path, "decoder", limit)
        codec, layout = _unbound(description)
        decoder = _load(codec.make_decoder(layout, description["plan"]), tensors)
        decoder.digest = bytes.fromhex(digest)
    return decoder


def load_codec(folder: Path, limit: int = LIMIT) -> Codec:
    """Read both halves from a folder that ``save_codec`` wrote.

    Args:
        folder: the folder.
        limit: bytes that each half may take beside 64 times those of its file.

    Raises:
        CodecMismatchError: as ``load_encoder`` and ``load_decoder`` do, or if the two files belong to different codecs.
    """
    with _sound(folder, limit):
        first, digest, encoder = _read(folder / ENCODER_FILE, "encoder", limit)
        second, other, decoder = _read(folder / DECODER_FILE, "decoder", limit)
        if first != second or digest != other:
            raise CodecMismatchError(f"{folder}: encoder and decoder belong to different codecs or versions; export both again")
        codec, layout = _unbound(first)
        codec.bind(layout, first["plan"])
        _load(codec.encoder, encoder)
        _load(codec.decoder, decoder)
        codec.update_digest()
        _require_digest(folder / ENCODER_FILE, "encoder", digest, codec.encoder.digest.hex())
    return codec


@contextmanager
def _sound(path: Path, limit: int) -> Iterator[None]:
    """Bound the memory that reading a file, or the two of a folder, takes, and make every fault of theirs a ``CodecMismatchError``."""
    files = [path / ENCODER_FILE, path / DECODER_FILE] if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    try:
        with Budget(sum(limit + WORTH * size for size in sizes)):
            yield
    except Exception as error:  # what a file says can fail in any way where it is followed
        if isinstance(error, CodecMismatchError) and str(path) in str(error):
            raise
        raise CodecMismatchError(f"Expected an exported codec at {path} but it cannot be made: {error}: {_AGAIN}") from error


def _unbound(description: dict[str, Any]) -> tuple[Codec, Layout]:
    """Return the described codec, in its version, and the layout that it is to be bound to."""
    codec = codec_from_config(description["config"])
    codec.version = description["version"]
    return codec, Layout.from_json(description["layout"])


def _load(half: P, tensors: dict[str, Tensor]) -> P:
    """Give a half its tensors, those of its names, types and shapes and no others, and return it."""
    expected = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in half.state_dict().items()}
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CodecMismatchError(f"Expected the tensor {name!r} to be {expected.get(name)} but the file has {found.get(name)}")
    half.load_state_dict(tensors)
    return half


def _require_digest(path: Path, half: str, expected: str, found: str) -> None:
    if found != expected:
        raise CodecMismatchError(f"Expected the {half} at {path} to have the digest that it was exported with but it has another: {_AGAIN}")


def _read(path: Path, half: Literal["encoder", "decoder"], limit: int) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """Return the codec's description and digest, and the half's tensors; a decoder's are what its own digest says."""
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
    if len(metadata["codec"]) > limit // 4:  # as objects its numbers take many times that
        raise CodecMismatchError(
            f"Expected a description of at most {limit // 4:,} characters at {path} but got {len(metadata['codec']):,}"
        )
    description, digest = json.loads(metadata["codec"]), metadata["digest"]
    kinds = {"config": dict, "layout": str, "plan": dict, "version": int}
    if not isinstance(description, dict) or {key: type(value) for key, value in description.items()} != kinds:
        raise CodecMismatchError(f"Expected a codec's {', '.join(kinds)} at {path} but the file describes something else: {_AGAIN}")
    if half == "decoder":
        _require_digest(path, half, metadata.get("own", ""), _decoder_digest(description, digest, tensors))
    return description, digest, tensors
