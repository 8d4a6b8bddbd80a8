"""Explicit random streams: the purpose of a draw is its name and determines its seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

Part = int | str


def derive_seed(*parts: Part) -> int:
    """Return the 63-bit seed of a path such as ``(seed, round, client, "batches")``.

    Parts are joined with their types, so ``("1",)`` and ``(1,)`` are different streams (a slash within a part is doubled, so
    that it does not separate parts); BLAKE2b makes streams of neighboring rounds or clients
    unrelated (torch's CPU generator uses 32 bits of the seed, NumPy's all).
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


def seed_process(seed: int) -> None:
    """Seed Python's and NumPy's global generators, which code that is not ours may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the legacy one is what others draw from)


@contextmanager
def untouched_generators(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Put the process's generators back at the end of the block: torch's, on these CUDA devices too, NumPy's and Python's."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
