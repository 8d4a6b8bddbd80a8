"""Torchvision's ResNet-18 for small images and federated data."""

from __future__ import annotations

import importlib
from functools import partial

from torch import Tensor, nn

from fedlight.core.errors import ConfigurationError, require_counts


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with group normalisation: 11,173,962 parameters for 10 classes of colour images.

    It is torchvision's, with a first convolution of 3 x 3 and stride 1 and without the first pooling, as is usual for images of 32 x 32.
    Batch statistics suffer from label skew between clients, group normalisation does not (Hsieh et al. 2020, arXiv 1910.00189).

    Args:
        in_channels: channels of an image.
        num_classes: width of the output.
        groups: groups of channels that are normalised together, a divisor of 64 (2 as in Reddi et al. 2021, arXiv 2003.00295).

    Raises:
        ConfigurationError: if a width is less than 1, or ``groups`` does not divide 64.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, groups: int = 2) -> None:
        super().__init__()
        require_counts(in_channels=in_channels, num_classes=num_classes)
        if groups < 1 or 64 % groups:
            raise ConfigurationError(f"Expected `groups` to be a divisor of 64, the channels of the first layers, but got {groups}")
        models = importlib.import_module("torchvision.models")
        self.layers = models.resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, groups))
        self.layers.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.layers.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
        self.layers.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, num_classes]`` of images ``[batch, in_channels, height, width]``."""
        logits: Tensor = self.layers(x)
        return logits
