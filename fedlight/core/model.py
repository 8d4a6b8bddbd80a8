"""The global model as two flat vectors, and as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedlight.core.digest import digest_tensors
from fedlight.core.errors import MessageError


@dataclass(frozen=True)
class Model:
    """A global model: weights ``[dim]`` and buffers ``[buffer_dim]`` (statistics of BatchNorm layers), float32."""

    weights: Tensor
    buffers: Tensor

    @cached_property
    def data(self) -> bytes:
        """The weights, then the buffers, 4 bytes a number."""
        return b"".join(part.detach().cpu().numpy().astype("<f4").tobytes() for part in (self.weights, self.buffers))

    @cached_property
    def digest(self) -> bytes:
        """Digest (32 bytes) of the weights."""
        return digest_tensors({"weights": self.weights})

    @classmethod
    def parse(cls, data: bytes, dim: int) -> Model:
        """Return the model of ``dim`` weights that ``data`` holds; raises ``MessageError`` if it holds no whole numbers or too few."""
        if len(data) % 4 or len(data) < 4 * dim:
            raise MessageError(f"Expected a model of {dim} weights and its buffers but got {len(data)} bytes")
        whole = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
        return cls(whole[:dim].clone(), whole[dim:].clone())
