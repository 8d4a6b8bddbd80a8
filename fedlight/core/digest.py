"""Digests by which two sides make sure that they hold the same model and the same encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlight.core.codec import Encoder


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


def encoder_digest(encoder: Encoder) -> bytes:
    """Return the digest (32 bytes) of a client's half: its class, layout, formats and tensors. Needs no decoder."""
    return digest_tensors(encoder.state_dict(), type(encoder).__qualname__, encoder.layout.to_json(), repr(encoder.format))
