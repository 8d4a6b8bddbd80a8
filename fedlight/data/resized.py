"""Images of one data set in the shape of another, to use as its proxy data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from fedlight.core.errors import DataError, require
from fedlight.data.arrays import Arrays
from fedlight.data.sources import DataSource


class Resized(DataSource):
    """Another source's images, scaled to ``size`` and converted between gray and color if the number of channels differs.

    Proxy data must have the input shape of the clients' data; this gives it to other public images.

    Args:
        source: The data set.
        size: Height and width of the images.
        channels: Channels of the images, 1 (the mean of colors) or 3 (gray repeated).
    """

    def __init__(self, source: DataSource, size: int, channels: int = 1) -> None:
        require(size >= 1 and channels in (1, 3), f"size and channels: expected size >= 1 and channels 1 or 3, got {size} and {channels}.")
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
