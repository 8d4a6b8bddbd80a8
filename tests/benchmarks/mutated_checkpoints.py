"""Checkpoints for ``tests.benchmarks.mutations``: how they are made, forged, and followed by a run."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedlight.clients.scaffold import Scaffold
from fedlight.core.checkpoint import read_checkpoint, write_checkpoint
from fedlight.data import Uniform
from tests.federation import federated, federated_data, learned, pretraining, trainer

ROUNDS = 2
MARK = b"sha256:"
Other = Callable[[Any, random.Random], Any]


def resume(path: Path | None) -> Any:
    """Begin a run, or go on from a checkpoint, whose rounds are done; return the Trainer."""
    module, runner = federated(codec=learned(), algorithm=Scaffold(lr=0.05, steps=1)), trainer(ROUNDS, callbacks=[pretraining()])
    runner.fit(module, datamodule=federated_data(sampler=Uniform(4)), ckpt_path=path)
    return runner


def checkpoint_files(folder: Path) -> list[Path]:
    """Write a checkpoint and its file of clients."""
    resume(None).save_checkpoint(folder / "last.ckpt")
    return sorted(folder.iterdir())


def with_digest(data: bytes) -> bytes:
    """Return a checkpoint's bytes with the digest that they have now."""
    body = data[: data.rfind(MARK) - 2]
    comment = MARK + hashlib.sha256(body + bytes(2)).hexdigest().encode()
    return body + struct.pack("<H", len(comment)) + comment


def forge_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Return a checkpoint with bits flipped, most of them near its beginning, and a digest that fits."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(min(len(raw), 4000) if draw.random() < 0.8 else len(raw))
        data[place] ^= 1 << draw.randrange(8)
    return with_digest(bytes(data))


def forge_value(path: Path, draw: random.Random, other: Other) -> bytes:
    """Return a checkpoint of which one value is another, with a digest that fits."""
    write_checkpoint(path, _forged(read_checkpoint(path), draw, other))
    return path.read_bytes()


def _forged(value: Any, draw: random.Random, other: Other) -> Any:
    if isinstance(value, torch.Tensor):
        flat = value.reshape(-1)
        return draw.choice((value[:0] if value.ndim else flat, value.double(), flat[:1], torch.zeros(1).expand(10**9), None, 3, "x"))
    if isinstance(value, (dict, list, tuple)) and value and draw.random() < 0.97:
        copied = list(value) if isinstance(value, tuple) else value.copy()
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < 0.1:
            del copied[key]
        else:
            copied[key] = _forged(value[key], draw, other)
        return tuple(copied) if isinstance(value, tuple) else copied
    return other(value, draw)
