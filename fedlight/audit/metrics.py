"""How close a reconstruction is: PSNR and SSIM of matched, clamped images, and whether a pool of images identifies it."""

from __future__ import annotations

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
