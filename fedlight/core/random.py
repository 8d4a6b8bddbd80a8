"""Explicit random streams: every draw is named by what it is for, and by nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Part = int | str


def derive_seed(*parts: Part) -> int:
    """Return the 63-bit seed that belongs to a path such as ``(seed, round, client, "batches")``.

    Parts are joined with their types, so ``("1",)`` and ``(1,)`` are different streams (a slash within a part is doubled, so
    that it separates nothing); BLAKE2b spreads neighbouring paths, so streams of neighbouring rounds or
    clients are unrelated (torch's CPU generator uses 32 bits of the seed, NumPy's all).
    """
    text = "/".join([type(part).__name__[0] + str(part).replace("/", "//") for part in parts])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(*parts: Part) -> torch.Generator:
    """Return a CPU ``torch.Generator`` seeded by ``derive_seed(*parts)``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def numpy_generator(*parts: Part) -> np.random.Generator:
    """Return a NumPy generator (PCG64) seeded by ``derive_seed(*parts)``."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))
