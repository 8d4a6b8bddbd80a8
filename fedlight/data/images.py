"""Images for proxy data: random fields with the spectrum of natural images, and those of another data set in another shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlight.core.errors import DataError, require, require_counts
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


class Resized(DataSource):
    """Another source's images, scaled to ``size`` and converted between gray and color if the number of channels differs.

    Proxy data must have the input shape of the clients' data; this gives it to other public images.

    Args:
        source: The data set.
        size: Height and width of the images.
        channels: Channels of the images, 1 (the mean of colors) or 3 (gray repeated).
    """

    def __init__(self, source: DataSource, size: int, channels: int = 1) -> None:
        require_counts(size=size)
        require(channels in (1, 3), f"channels: expected 1 or 3, got {channels}.")
        self.source = source
        self.size = size
        self.channels = channels

    @property
    def name(self) -> str:
        """The source's name and the new shape."""
        return f"{self.source.name} at {self.channels}x{self.size}x{self.size}"

    def prepare(self, root: Path) -> None:
        """Download the wrapped source."""
        self.source.prepare(root)

    def load(self, root: Path) -> Arrays:
        """Load and convert the images; raises DataError if the source has no images."""
        data = self.source.load(root)
        return replace(data, x_train=self._change(data.x_train), x_test=self._change(data.x_test))

    def _change(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise DataError(f"{self.source.name}: expected images of 1 or 3 channels to resize, got inputs of shape {tuple(x.shape[1:])}.")
        if self.channels < x.shape[1]:
            x = x.mean(1, keepdim=True)
        # Antialiased, so that every old pixel counts.
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        return x.expand(-1, self.channels, -1, -1).contiguous()
