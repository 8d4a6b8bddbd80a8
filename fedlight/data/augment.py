"""Random changes of training images, drawn from a given generator."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from fedlight.core.errors import ConfigurationError, require


class Augmentation(ABC):
    """A random change of a batch of inputs that keeps their shape."""

    @abstractmethod
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed ``x`` (``[n, c, h, w]``, any device), with all randomness from ``generator`` (on the CPU)."""

    def validate(self, input_shape: tuple[int, ...]) -> None:  # noqa: B027  (not every augmentation is picky)
        """Raise ConfigurationError if inputs of ``input_shape`` (without the batch axis) cannot be augmented."""


class _OfImages(Augmentation):
    def validate(self, input_shape: tuple[int, ...]) -> None:
        """Raise ConfigurationError unless inputs are images ``[c, h, w]``."""
        if len(input_shape) != 3:
            raise ConfigurationError(
                f"augmentation: {type(self).__name__} expected images [channels, height, width], got inputs of shape {input_shape}; "
                "remove it."
            )


class CropFlip(_OfImages):
    """Random crop after zero padding, then a horizontal flip with probability 1/2 (He et al. 2016, arXiv 1512.03385).

    On normalized images the zero padding is the mean color.

    Args:
        padding: Pixels added on each side before the crop.
        flip: Whether to flip; wrong for digits and letters.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        require(padding >= 0, f"padding: expected 0 or more pixels, got {padding}.")
        self.padding = padding
        self.flip = flip

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``x`` shifted and flipped sample by sample; raises ConfigurationError unless it is ``[n, c, h, w]``."""
        self.validate(tuple(x.shape[1:]))
        n, _, _, width = x.shape
        shifts = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator)
        flips = torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        columns = torch.arange(width).expand(n, width)
        columns = torch.where(flips[:, None], columns.flip(1), columns)
        return crop(functional.pad(x, [self.padding] * 4), shifts[0], shifts[1], x.shape[2], columns)


class Affine(_OfImages):
    """Small random rotation, scaling, shear and shift of each image, bilinearly resampled; pixels from outside get the darkest value.

    Meant for proxy data: a few images then give updates as varied as those of many.

    Args:
        degrees: Largest rotation in either direction.
        scale: Largest relative change of size.
        shift: Largest shift in pixels, along each axis.
        shear: Largest shear.
    """

    def __init__(self, degrees: float = 10.0, scale: float = 0.1, shift: float = 1.0, shear: float = 0.0) -> None:
        require(0 <= degrees <= 180, f"Expected `degrees` in 0..180 but got {degrees}")
        require(0 <= scale < 1, f"Expected `scale` in [0, 1) but got {scale}")
        require(shift >= 0, f"Expected `shift` >= 0 but got {shift}")
        require(shear >= 0, f"Expected `shear` >= 0 but got {shear}")
        self.degrees = degrees
        self.scale = scale
        self.shift = shift
        self.shear = shear

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``x`` changed sample by sample; raises ConfigurationError unless it is ``[n, c, h, w]``."""
        self.validate(tuple(x.shape[1:]))
        n, _, height, width = x.shape
        if not n:
            return x
        turn, size, slant, right, down = (2 * torch.rand(5, n, generator=generator) - 1).unbind()
        angle, factor = turn * math.radians(self.degrees), 1 + size * self.scale
        top = torch.stack([angle.cos() * factor, slant * self.shear - angle.sin() * factor, right * self.shift * 2 / width], dim=1)
        bottom = torch.stack([angle.sin() * factor, angle.cos() * factor, down * self.shift * 2 / height], dim=1)
        grid = functional.affine_grid(torch.stack([top, bottom], dim=1).to(x), list(x.shape), align_corners=False)
        darkest = x.amin()  # resampling pads with 0
        return functional.grid_sample(x - darkest, grid, align_corners=False).add_(darkest)


def crop(x: Tensor, top: Tensor, left: Tensor, height: int, columns: Tensor) -> Tensor:
    """Gather ``height`` rows starting at ``top`` and the given ``columns`` starting at ``left`` of each image.

    ``x``: ``[n, c, H, W]``; ``top``, ``left``: int64 ``[n]``; ``columns``: int64 ``[n, width]``; returns ``[n, c, height, width]``.
    """
    n, channels = x.shape[:2]
    rows = (top[:, None] + torch.arange(height)).to(x.device)
    cols = (left[:, None] + columns).to(x.device)
    samples = torch.arange(n, device=x.device).view(-1, 1, 1, 1)
    planes = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return x[samples, planes, rows[:, None, :, None], cols[:, None, None, :]]
