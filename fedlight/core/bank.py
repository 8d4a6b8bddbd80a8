"""The update bank: recorded client updates that a codec is fitted to, in memory or in a file that is read as needed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedlight.core.errors import ConfigurationError
from fedlight.core.files import replacing
from fedlight.core.layout import Layout

_ALIGNMENT = 64
"""Bytes to which the numbers in a file are aligned, as in memory: the rounding of some kernels depends on it."""
_METADATA = {"layout", "digest", "format"}
"""What a bank's file can say of itself; `format` is what other programs add."""


@dataclass(frozen=True)
class UpdateBank:
    """Recorded updates ``[rounds, clients, dim]`` (float32) with the layout that says what they mean.

    Iterating gives one round ``[clients, dim]`` after another, and copies nothing: of a bank in a file, which is mapped into memory, no
    more than the rounds in use need be resident.

    Args:
        recorded: all that was recorded, ``[rounds, clients, dim]``.
        layout: what the updates mean.
        chosen: the rounds that belong to this bank; all of them if not given.

    Raises:
        ConfigurationError: if the shape is another, or a number is not finite.
    """

    recorded: Tensor
    layout: Layout
    chosen: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.recorded.ndim != 3 or self.recorded.shape[-1] != self.layout.dim or 0 in self.recorded.shape:
            raise ConfigurationError(
                f"Expected `updates` of shape [rounds >= 1, clients >= 1, {self.layout.dim}] but got {list(self.recorded.shape)}"
            )
        # A part of a bank was checked with the whole, which may take a while to read.
        if self.chosen is None and not all(torch.isfinite(updates.sum()) for updates in self):
            raise ConfigurationError("Expected finite `updates` but the bank holds NaN or Inf: lower the client learning rate")

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the rounds, ``[clients, dim]`` each, as views."""
        return (self.recorded[number] for number in (range(len(self.recorded)) if self.chosen is None else self.chosen))

    @property
    def updates(self) -> Tensor:
        """All updates ``[rounds, clients, dim]`` in one tensor: a copy in memory where the bank is a part of another."""
        return self.recorded if self.chosen is None else self.recorded[list(self.chosen)]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.recorded) if self.chosen is None else len(self.chosen)

    @property
    def clients(self) -> int:
        """Number of clients recorded in every round."""
        return self.recorded.shape[1]

    def flat(self) -> Tensor:
        """Return all updates as rows ``[rounds * clients, dim]``."""
        return self.updates.flatten(0, 1)

    def take(self, rounds: Tensor, clients: Tensor) -> Tensor:
        """Return the updates ``[..., dim]`` of rounds ``[...]`` (numbers within this bank) and clients ``[...]``, broadcast."""
        return self.recorded[rounds if self.chosen is None else torch.tensor(self.chosen)[rounds], clients]

    def split(self, holdout: float) -> tuple[UpdateBank, UpdateBank]:
        """Return (training, held-out) banks: every k-th round is held out, so both span the whole trajectory. Nothing is copied.

        Raises:
            ConfigurationError: if there are fewer than two rounds.
        """
        if self.rounds < 2:
            raise ConfigurationError(f"Expected a bank of at least 2 rounds to hold some out but got {self.rounds}")
        numbers = tuple(range(self.rounds)) if self.chosen is None else self.chosen
        step = max(2, round(1 / holdout))
        held = numbers[step - 1 :: step] or numbers[-1:]
        kept = tuple(number for number in numbers if number not in held)
        return UpdateBank(self.recorded, self.layout, kept), UpdateBank(self.recorded, self.layout, held)

    def map(self, updates: Tensor, layout: Layout) -> UpdateBank:
        """Return the bank of these updates' codes: what the next codec of a chain is fitted to."""
        return UpdateBank(updates.reshape(self.rounds, self.clients, -1), layout)

    def save(self, path: str | Path) -> None:
        """Write the bank as safetensors, round by round."""
        write_bank(Path(path), self.layout, self.rounds, self.clients, self)

    @classmethod
    def load(cls, path: str | Path) -> UpdateBank:
        """Open a bank that ``save`` wrote: the file is mapped into memory and read as needed, and once as a whole to check it.

        Raises:
            ConfigurationError: if the file is missing, is damaged or holds something else.
        """
        try:
            return cls._load(Path(path))
        except Exception as error:  # what a damaged header says can fail in any way where it is followed
            if isinstance(error, ConfigurationError) and str(path) in str(error):
                raise
            raise ConfigurationError(f"Expected recorded updates in {path} but could not read them: {error}: record them again") from error

    @classmethod
    def _load(cls, path: Path) -> UpdateBank:
        with safe_open(path, framework="pt") as file:  # checks that the header is sound and the file complete
            names, metadata = file.keys(), file.metadata() or {}
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            if kinds != {"updates": "F32"} or "layout" not in metadata or not metadata.keys() <= _METADATA:
                raise ConfigurationError(f"Expected recorded updates (float32, with their layout) in {path} but it holds {kinds}")
            layout, shape = Layout.from_json(metadata["layout"]), file.get_slice("updates").get_shape()
        with open(path, "rb") as raw:
            start = 8 + struct.unpack("<Q", raw.read(8))[0]
            size = raw.seek(0, 2)
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        recorded = whole[start:].view(torch.float32).view(shape)
        if "digest" in metadata:  # not in a file that another program wrote
            digest = _new_digest(layout, *shape[:2])
            for updates in recorded:
                digest.update(updates.numpy().data)
            if digest.hexdigest() != metadata["digest"]:
                raise ConfigurationError(
                    f"Expected the updates in {path} to have the digest of when they were recorded but they have another: record them again"
                )
        return cls(recorded, layout)


def write_bank(path: Path, layout: Layout, rounds: int, clients: int, updates: Iterable[Tensor]) -> None:
    """Write a bank's file while its rounds, ``[clients, dim]`` each, come: a safetensors file of which one round is held at a time.

    A file of that name is replaced when the new one is complete and synced: it may be the one that ``updates`` are read from.
    """
    digest = _new_digest(layout, rounds, clients)
    with replacing(path) as file:
        file.write(_header(layout, rounds, clients, "0" * 2 * digest.digest_size))
        for part in updates:
            numbers = part.to("cpu", torch.float32).contiguous().numpy().data
            file.write(numbers)
            digest.update(numbers)
        file.seek(0)
        file.write(_header(layout, rounds, clients, digest.hexdigest()))


def _header(layout: Layout, rounds: int, clients: int, digest: str) -> bytes:
    """Return what comes before the numbers in a bank's file: as long whatever the digest is."""
    size = 4 * rounds * clients * layout.dim
    entry = {"dtype": "F32", "shape": [rounds, clients, layout.dim], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"layout": layout.to_json(), "digest": digest}, "updates": entry}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    return struct.pack("<Q", len(header)) + header


def _new_digest(layout: Layout, rounds: int, clients: int) -> hashlib._Hash:
    """Return the digest of a bank without its numbers: of its layout and shape."""
    return hashlib.sha256(f"{layout.to_json()} {rounds} {clients}".encode())
