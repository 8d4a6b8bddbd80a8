"""Digests for checking that two sides have the same model and the same encoder."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlight.core.codec import Context, Encoder
from fedlight.core.errors import ConfigurationError


def digest_tensors(tensors: Mapping[str, Tensor], *texts: str) -> bytes:
    """Return the SHA-256 digest (32 bytes) of texts and of named tensors: names, types, shapes and every bit.

    >>> digest_tensors({"w": torch.zeros(2)}) == digest_tensors({"w": torch.zeros(2)})
    True
    >>> digest_tensors({"w": torch.zeros(2)}) == digest_tensors({"w": torch.tensor([0.0, -0.0])})
    False
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text.encode())} {text}".encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def digest_context(context: Context) -> bytes:
    """Return the digest (32 bytes) of the context of a pass: seed, round, attempt, step and the broadcast.

    It does not depend on the order of a mapping, but on a number's type and every bit.

    Raises:
        ConfigurationError: if the broadcast contains anything but numbers, texts, tensors, and lists and mappings of them.

    >>> digest_context(Context(broadcast={"gain": 1.0})) == digest_context(Context(broadcast={"gain": 1e30}))
    False
    """
    values = [context.seed, context.round, context.attempt, context.step, context.broadcast]
    return hashlib.sha256(_canonical(values)).digest()


def _canonical(value: Any) -> bytes:
    """Return bytes unique to the value: a letter for the kind, and a length before everything of variable length."""
    if isinstance(value, Mapping):
        items = sorted((str(key), _canonical(entry)) for key, entry in value.items())
        return b"m%d " % len(items) + b"".join(_canonical(key) + entry for key, entry in items)
    if isinstance(value, (list, tuple)):
        return b"l%d " % len(value) + b"".join(map(_canonical, value))
    if isinstance(value, Tensor):
        return b"t" + digest_tensors({"": value})
    if isinstance(value, str):
        return b"s%d " % len(value.encode()) + value.encode()
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if value is None or isinstance(value, int):
        return f"i{value} ".encode()
    raise ConfigurationError(
        f"Expected a broadcast of numbers, texts, tensors, lists or mappings but got {type(value).__name__}: broadcast those, so "
        "that clients can check that all received the same"
    )


def encoder_digest(encoder: Encoder) -> bytes:
    """Return the digest (32 bytes) of an encoder: of the stamp of its codec, and of its current tensors.

    The stamp covers everything that is not a tensor: every inner codec, seeds and steps. It needs no decoder.
    """
    return digest_tensors(encoder.state_dict(), encoder.digest.hex())
