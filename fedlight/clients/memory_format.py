"""How images lie in memory while clients train: channels last where convolutions are faster for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pays_channels_last(network: nn.Module, x: object) -> bool:
    """Whether batches like ``x`` ``[n, channels, height, width]`` should lie channels last: on the CPU, for convolutional networks.

    Layers hand the layout on, and weights keep theirs, so that it changes results by rounding alone. A network that cannot take it (one
    that calls ``view`` on feature maps) keeps images as they are: ``network`` is tried on the first sample.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] == 1 or x.device.type != "cpu" or not x.is_floating_point():
        return False
    if not any(isinstance(layer, nn.Conv2d) for layer in network.modules()):
        return False
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            network(x[:1].contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    finally:
        network.train(training)
    return True
