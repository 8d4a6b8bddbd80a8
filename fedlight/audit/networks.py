"""The usual demonstration network for gradient inversion: a positive control for an attack."""

from __future__ import annotations

from torch import Tensor, nn

from fedlight.core.errors import require_counts, require_positive


class SigmoidLeNet(nn.Module):
    """The small LeNet with sigmoids and strides of the DLG authors (Zhu et al. 2019), which L-BFGS inverts well.

    About 13,000 parameters on 28 x 28 images of one channel. Initial weights are uniform in +-0.5, as in the authors' code.

    Args:
        in_channels: channels of an image.
        image_size: height and width of an image.
        num_classes: width of the output.
        channels: channels of the convolutions.
        init: half the width of the range of the initial weights.

    Raises:
        ConfigurationError: if a number is less than 1, or ``init`` not positive.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10, channels: int = 12, init: float = 0.5) -> None:
        super().__init__()
        require_counts(in_channels=in_channels, image_size=image_size, num_classes=num_classes, channels=channels)
        require_positive(init=init)
        side = (image_size + 3) // 4
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(channels, channels, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(channels, channels, 5, stride=1, padding=2),
            nn.Sigmoid(),
            nn.Flatten(),
        )
        self.head = nn.Linear(channels * side * side, num_classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init, init)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, classes]`` of images ``[n, c, h, w]``."""
        logits: Tensor = self.head(self.body(x))
        return logits
