"""Random changes of training images, drawn from a generator that is handed in."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from fedlight.core.errors import ConfigurationError


class Augmentation(ABC):
    """A random change of a batch of inputs that keeps their shape."""

    @abstractmethod
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed ``x`` (``[n, c, h, w]``, any device), with all randomness from ``generator`` (on the CPU)."""

    def validate(self, input_shape: tuple[int, ...]) -> None:  # noqa: B027  (not every augmentation is picky)
        """Raise ConfigurationError if inputs of ``input_shape`` (without the batch axis) cannot be augmented."""


class CropFlip(Augmentation):
    """Random crop after zero padding, then a horizontal flip with probability 1/2 (He et al. 2016, arXiv 1512.03385).

    On normalised images the zero padding is the mean colour.

    Args:
        padding: Pixels added on each side before the crop.
        flip: Whether to flip; wrong for digits and letters.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise ConfigurationError(f"padding: expected 0 or more pixels, got {padding}.")
        self.padding = padding
        self.flip = flip

    def validate(self, input_shape: tuple[int, ...]) -> None:
        """Raise ConfigurationError unless inputs are images ``[c, h, w]``."""
        if len(input_shape) != 3:
            raise ConfigurationError(
                f"augmentation: CropFlip expected images [channels, height, width], got inputs of shape {input_shape}; remove it."
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``x`` shifted and flipped sample by sample; raises ConfigurationError unless it is ``[n, c, h, w]``."""
        self.validate(tuple(x.shape[1:]))
        n, _, _, width = x.shape
        shifts = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator)
        flips = torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        columns = torch.arange(width).expand(n, width)
        columns = torch.where(flips[:, None], columns.flip(1), columns)
        return crop(functional.pad(x, [self.padding] * 4), shifts[0], shifts[1], x.shape[2], columns)


def crop(x: Tensor, top: Tensor, left: Tensor, height: int, columns: Tensor) -> Tensor:
    """Gather ``height`` rows from ``top`` on and, from ``left`` on, the given ``columns`` of each image.

    ``x``: ``[n, c, H, W]``; ``top``, ``left``: int64 ``[n]``; ``columns``: int64 ``[n, width]``; returns ``[n, c, height, width]``.
    """
    n, channels = x.shape[:2]
    rows = (top[:, None] + torch.arange(height)).to(x.device)
    cols = (left[:, None] + columns).to(x.device)
    samples = torch.arange(n, device=x.device).view(-1, 1, 1, 1)
    planes = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return x[samples, planes, rows[:, None, :, None], cols[:, None, None, :]]
