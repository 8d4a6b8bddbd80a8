"""How close a reconstruction is: PSNR and SSIM of matched, clamped images, whether a pool identifies it, and guesses to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

CEILING = 100.0
"""PSNR in dB from which images count as equal (an exact copy has no finite PSNR)."""


def psnr(guess: Tensor, true: Tensor) -> Tensor:
    """Return the PSNR ``[n]`` in dB of images ``[n, c, h, w]``, clamped to 0..1, by TorchMetrics with a data range of 1.

    >>> psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5))
    tensor([20.0000])
    """
    pairs = zip(guess.float().clamp(0, 1), true.float().clamp(0, 1), strict=True)
    values = [peak_signal_noise_ratio(a[None], b[None], data_range=1.0) for a, b in pairs]
    return torch.stack(values).cpu().nan_to_num(posinf=CEILING).clamp(max=CEILING)


def ssim(guess: Tensor, true: Tensor) -> Tensor:
    """Return the SSIM ``[n]`` of images ``[n, c, h, w]``, clamped to 0..1, by TorchMetrics (windows of at most 7 pixels)."""
    side = min(true.shape[-2:])
    if side < 3:
        return torch.full((len(true),), float("nan"))
    window = min(7, side if side % 2 else side - 1)
    values = structural_similarity_index_measure(
        guess.float().clamp(0, 1), true.float().clamp(0, 1), gaussian_kernel=False, kernel_size=window, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(-1).cpu()


def match(guess: Tensor, true: Tensor) -> Tensor:
    """Return the index of the guess assigned to each true image, ``[n]``: the assignment of least squared error (Kuhn 1955).

    A mean gradient does not depend on the order of the batch, so the order of a guess does not count.
    """
    cost = torch.cdist(true.float().clamp(0, 1).flatten(1), guess.float().clamp(0, 1).flatten(1)).square()
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(columns[rows.argsort()])


def matched(guess: Tensor, true: Tensor) -> Tensor:
    """Return the guesses ``[n, c, h, w]`` in the order of their assigned true images."""
    return guess[match(guess, true).to(guess.device)]


def identification_rate(guess: Tensor, true: Tensor, pool: Tensor) -> float:
    """Return the share of guesses that are closer to the true image than to every image ``[m, c, h, w]`` of a pool."""
    flat = guess.float().clamp(0, 1).flatten(1)
    own = (flat - true.float().flatten(1)).norm(dim=1)
    others = torch.cdist(flat, pool.float().flatten(1)).amin(1)
    return float((own < others).double().mean())


@dataclass(frozen=True)
class Controls:
    """Guesses from public images and labels alone, which use nothing that clients send: the least that an attack has to beat."""

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
