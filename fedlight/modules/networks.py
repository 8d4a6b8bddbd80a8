"""Small networks of the federated-learning literature, with their parameter counts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from fedlight.core.errors import ConfigurationError, require, require_choice, require_counts

Norm = Literal["none", "group", "batch"]

_GROUPS = 8


class MLP(nn.Module):
    """A perceptron on flattened inputs: linear layers with ReLU and dropout between them.

    With ``hidden=[]`` it is softmax regression: 7,850 parameters on MNIST, 30,730 on CIFAR-10.

    Args:
        in_features: numbers in one input, such as ``1 * 28 * 28``.
        hidden: widths of the hidden layers, none for a linear model.
        num_classes: width of the output.
        dropout: probability that a hidden activation is dropped in training.

    Raises:
        ConfigurationError: if a width is less than 1 or ``dropout`` is not in [0, 1).
    """

    def __init__(self, in_features: int, hidden: list[int], num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        require_counts(in_features=in_features, num_classes=num_classes, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        require(0 <= dropout < 1, f"Expected `dropout` in [0, 1) but got {dropout}")
        self.layers = _perceptron([in_features, *hidden, num_classes], dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, num_classes]`` of inputs ``[batch, ...]`` with ``in_features`` numbers each."""
        logits: Tensor = self.layers(x)
        return logits


class _ImageNetwork(nn.Module):
    features: nn.Sequential
    classifier: nn.Sequential

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        require_counts(in_channels=in_channels, num_classes=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, num_classes]`` of images ``[batch, in_channels, image_size, image_size]``."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class LeNet5(_ImageNetwork):
    """LeNet-5 with ReLU and max pooling (after LeCun et al. 1998, Figure 2): 61,706 parameters for MNIST.

    Args:
        in_channels: channels of an image.
        num_classes: width of the output.
        image_size: height and width of an image, at least 12.

    Raises:
        ConfigurationError: if the image is too small or a width is less than 1.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__(in_channels, num_classes)
        side = _side_left("LeNet5", image_size, lambda size: (size // 2 - 4) // 2)
        self.features = nn.Sequential(*_convolution(in_channels, 6, 5, padding=2), *_convolution(6, 16, 5))
        self.classifier = _perceptron([16 * side * side, 120, 84, num_classes])


class BenchmarkCNN(_ImageNetwork):
    """The two-convolution CNN of the pfl-research benchmarks (Granqvist et al. 2024, arXiv 2404.06430): 1,626,442 parameters for CIFAR-10.

    Args:
        in_channels: channels of an image.
        num_classes: width of the output.
        image_size: height and width of an image, at least 6.

    Raises:
        ConfigurationError: if the image is too small or a width is less than 1.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__(in_channels, num_classes)
        side = _side_left("BenchmarkCNN", image_size, lambda size: (size - 4) // 2)
        self.features = nn.Sequential(*_convolution(in_channels, 32, pool=False), *_convolution(32, 64), nn.Dropout(0.25))
        self.classifier = _perceptron([64 * side * side, 128, num_classes], dropout=0.5)


class SmallCNN(_ImageNetwork):
    """Three convolutions (32, 64, 64) and two linear layers: 122,570 parameters for CIFAR-10, 122,890 with normalisation.

    Args:
        in_channels: channels of an image.
        num_classes: width of the output.
        image_size: height and width of an image, at least 18.
        norm: normalisation after each convolution: none, group (8 groups of channels) or batch. Batch statistics suffer from label skew
            between clients, group normalisation does not (Hsieh et al. 2020, arXiv 1910.00189).

    Raises:
        ConfigurationError: if the image is too small, a width is less than 1 or ``norm`` is unknown.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, image_size: int = 32, norm: Norm = "none") -> None:
        super().__init__(in_channels, num_classes)
        side = _side_left("SmallCNN", image_size, lambda size: ((size - 2) // 2 - 2) // 2 - 2)
        require_choice("norm", norm, get_args(Norm))
        blocks = (_convolution(in_channels, 32, norm=norm), _convolution(32, 64, norm=norm), _convolution(64, 64, norm=norm, pool=False))
        self.features = nn.Sequential(*(layer for block in blocks for layer in block))
        self.classifier = _perceptron([64 * side * side, 64, num_classes])


def _convolution(channels: int, out: int, kernel: int = 3, *, padding: int = 0, norm: Norm = "none", pool: bool = True) -> list[nn.Module]:
    """Return a convolution, what normalises its ``out`` channels, ReLU, and max pooling by 2."""
    layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, padding=padding)]
    if norm != "none":
        layers.append(nn.GroupNorm(_GROUPS, out) if norm == "group" else nn.BatchNorm2d(out))
    return [*layers, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]


def _perceptron(widths: list[int], dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers of these widths on flattened inputs, with ReLU and dropout between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths[:-1]):
        layers += [nn.Linear(width, following), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def _side_left(name: str, image_size: int, side: Callable[[int], int]) -> int:
    if side(image_size) < 1:
        least = next(size for size in range(1, 1000) if side(size) >= 1)
        raise ConfigurationError(
            f"Expected `image_size` >= {least} for {name} but got {image_size}: its convolutions and pooling leave nothing of such an "
            "image; enlarge the images or use MLP"
        )
    return side(image_size)


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
