"""The update bank: recorded client updates that a codec is fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout


@dataclass(frozen=True)
class UpdateBank:
    """Recorded updates ``[rounds, clients, dim]`` (float32) with the layout that says what they mean."""

    updates: Tensor
    layout: Layout

    def __post_init__(self) -> None:
        if self.updates.ndim != 3 or self.updates.shape[-1] != self.layout.dim or 0 in self.updates.shape:
            raise ConfigurationError(
                f"Expected `updates` of shape [rounds >= 1, clients >= 1, {self.layout.dim}] but got {list(self.updates.shape)}"
            )
        if not torch.isfinite(self.updates.sum()):
            raise ConfigurationError("Expected finite `updates` but the bank holds NaN or Inf: lower the client learning rate")

    @property
    def rounds(self) -> int:
        """Number of recorded rounds."""
        return self.updates.shape[0]

    @property
    def clients(self) -> int:
        """Number of clients recorded in every round."""
        return self.updates.shape[1]

    def flat(self) -> Tensor:
        """Return all updates as rows ``[rounds * clients, dim]``."""
        return self.updates.flatten(0, 1)

    def split(self, holdout: float) -> tuple[UpdateBank, UpdateBank]:
        """Return (training, held-out) banks: every k-th round is held out, so both span the whole trajectory.

        Raises:
            ConfigurationError: if there are fewer than two rounds.
        """
        if self.rounds < 2:
            raise ConfigurationError(f"Expected a bank of at least 2 rounds to hold some out but got {self.rounds}")
        step = max(2, round(1 / holdout))
        held = torch.zeros(self.rounds, dtype=torch.bool)
        held[step - 1 :: step] = True
        if not held.any():
            held[-1] = True
        return UpdateBank(self.updates[~held], self.layout), UpdateBank(self.updates[held], self.layout)

    def map(self, updates: Tensor, layout: Layout) -> UpdateBank:
        """Return the bank of these updates' codes: what the next codec of a chain is fitted to."""
        return UpdateBank(updates.reshape(self.rounds, self.clients, -1), layout)

    def save(self, path: Path) -> None:
        """Write the bank as safetensors."""
        save_file({"updates": self.updates.contiguous()}, path, metadata={"layout": self.layout.to_json()})

    @classmethod
    def load(cls, path: Path) -> UpdateBank:
        """Read a bank that ``save`` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("updates"), Layout.from_json(file.metadata()["layout"]))
