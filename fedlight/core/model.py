"""The global model as two flat vectors and what else training changes, and as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedlight.core.digest import digest_tensors
from fedlight.core.errors import MessageError


@dataclass(frozen=True)
class Model:
    """A global model: weights ``[dim]``, buffers ``[buffer_dim]`` (statistics of normalisation layers), each in its own float type.

    ``extras`` holds by name what else training has changed since the model was made (see ``fedlight.core.buffers``).
    """

    weights: Tensor
    buffers: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """The weights, then the buffers: 4 bytes a number of float32."""
        return number_bytes(self.weights) + number_bytes(self.buffers)

    @cached_property
    def digest(self) -> bytes:
        """Digest (32 bytes) of the weights."""
        return digest_tensors({"weights": self.weights})

    @classmethod
    def parse(cls, data: bytes, dim: int, weights: torch.dtype = torch.float32, buffers: torch.dtype = torch.float32) -> Model:
        """Return the model of ``dim`` weights that ``data`` holds; raises ``MessageError`` if it holds no whole numbers or too few."""
        end = dim * weights.itemsize
        if len(data) < end or (len(data) - end) % buffers.itemsize:
            raise MessageError(f"Expected a model of {dim} weights and its buffers but got {len(data)} bytes")
        return cls(numbers(data[:end], weights), numbers(data[end:], buffers))


def number_bytes(vector: Tensor) -> bytes:
    """Return the bytes of a vector's numbers (little-endian)."""
    flat = vector.detach().cpu().contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def numbers(data: bytes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the vector whose bytes these are, in memory of its own."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
