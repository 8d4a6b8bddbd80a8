"""Guesses that use nothing that clients send: the least that an attack has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Controls:
    """Guesses from public images and labels alone."""

    mean: Tensor  # image [c, h, w]
    class_means: Tensor  # images [classes, c, h, w]
    medoids: Tensor  # for every class the public image nearest to its mean, [classes, c, h, w]

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, classes: int) -> Controls:
        """Compute them from public images ``[n, c, h, w]`` and labels ``[n]``; a class without images gets the mean of all images."""
        mean = images.mean(0)
        means, medoids = [], []
        for label in range(classes):
            own = images[labels == label]
            own = own if len(own) else mean[None]
            means.append(own.mean(0))
            medoids.append(own[(own - own.mean(0)).flatten(1).norm(dim=1).argmin()])
        return cls(mean, torch.stack(means), torch.stack(medoids))

    def guesses(self, labels: Tensor) -> dict[str, Tensor]:
        """Return guesses ``[n, c, h, w]`` by name, for images with known labels ``[n]``.

        ``mean_image`` does not use them, ``class_mean`` is the best guess in squared error, ``label_only`` a real image of the class.
        """
        return {
            "mean_image": self.mean.expand(len(labels), *self.mean.shape),
            "class_mean": self.class_means[labels],
            "label_only": self.medoids[labels],
        }
