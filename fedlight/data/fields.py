"""Synthetic images: random fields with the spectrum of natural images, for runs without proxy data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedlight.core.errors import require, require_counts
from fedlight.core.random import torch_generator
from fedlight.data.arrays import Arrays
from fedlight.data.sources import DataSource


class RandomFields(DataSource):
    """Gaussian random fields whose amplitude falls with frequency as ``1 / f**power``, with meaningless labels.

    Amplitudes of natural images fall roughly as ``1 / f`` (Field 1987, J. Opt. Soc. Am. A 4(12)). A codec fitted to updates on such
    images learns the network's part of an update and little of the data's: refresh it with a history of decoded aggregates.

    Args:
        size: Height and width of the images.
        channels: Channels of the images, independent of each other.
        num_classes: Number of labels, equally frequent.
        samples: Number of training images.
        power: How fast amplitudes fall: 0 is white noise.
        seed: Seed of the images.
    """

    def __init__(self, size: int, channels: int = 1, num_classes: int = 10, samples: int = 4000, power: float = 1.0, seed: int = 0) -> None:
        require_counts(size=size, channels=channels, num_classes=num_classes, samples=samples)
        require(power >= 0, f"power: expected at least 0, got {power}.")
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.samples = samples
        self.power = power
        self.seed = seed

    @property
    def name(self) -> str:
        """The shape and the exponent of the images."""
        return f"random fields {self.channels}x{self.size}x{self.size} (1/f^{self.power:g})"

    def load(self, root: Path) -> Arrays:
        """Draw the images, with mean 0 and standard deviation 1."""
        labels = torch.arange(self.samples) % self.num_classes
        test = max(1, self.samples // 10)
        return Arrays(self._draw("train", self.samples), labels, self._draw("test", test), labels[:test], self.num_classes)

    def _draw(self, split: str, count: int) -> Tensor:
        noise = torch.randn(count, self.channels, self.size, self.size, generator=torch_generator(self.seed, "random fields", split))
        across = torch.fft.fftfreq(self.size)
        frequency = (across[:, None] ** 2 + across**2).sqrt().clamp(min=1 / self.size)
        fields: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * frequency**-self.power).real
        return (fields - fields.mean()) / fields.std()
