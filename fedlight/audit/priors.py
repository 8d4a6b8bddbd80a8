"""What an attacker knows about images in advance: coordinates to search in, and a penalty on unlikely images."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.core.errors import require, require_counts
from fedlight.core.linalg import svd


class Prior(ABC):
    """A map from latent coordinates ``[n, latent]`` to images ``[n, c, h, w]`` in about 0..1, fitted to public images."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return type(self).__name__

    def fit(self, images: Tensor, generator: torch.Generator) -> Self:
        """Return a copy fitted to public images ``[n, c, h, w]``."""
        fitted = copy.deepcopy(self)
        fitted.shape = tuple(images.shape[1:])
        fitted.learn(images.double(), generator)
        return fitted

    def learn(self, images: Tensor, generator: torch.Generator) -> None:  # noqa: B027  (a prior may have nothing to learn)
        """Adapt to public images."""

    @abstractmethod
    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return coordinates ``[count, latent]`` to start the search from."""

    @abstractmethod
    def images(self, latent: Tensor) -> Tensor:
        """Return the images of coordinates, differentiably."""

    def project(self, latent: Tensor) -> None:  # noqa: B027  (only pixels have a box)
        """Clamp the coordinates to their range, in place."""

    def penalty(self, latent: Tensor) -> Tensor:
        """Return how unlikely the coordinates are, 0-d, to add to a loss that is 1 where a guess explains nothing."""
        return torch.zeros((), dtype=latent.dtype, device=latent.device)


class Pixels(Prior):
    """No prior: the coordinates are the pixels, initially noise around mid-gray."""

    name = "none"

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return noisy gray pixels ``[count, c * h * w]``."""
        return 0.5 + 0.25 * torch.randn(count, *self.shape, generator=generator, dtype=torch.float64).flatten(1)

    def images(self, latent: Tensor) -> Tensor:
        """Return the pixels as images."""
        return latent.view(len(latent), *self.shape)

    def project(self, latent: Tensor) -> None:
        """Keep pixels in 0..1."""
        latent.clamp_(0, 1)


class TotalVariation(Pixels):
    """Neighboring pixels are similar (Geiping et al. 2020, arXiv 2003.14053, Eq. 4).

    Args:
        weight: weight of the mean absolute difference between neighbors.
    """

    name = "TV"

    def __init__(self, weight: float = 1e-2) -> None:
        require(weight > 0, f"Expected `weight` > 0 but got {weight}: leave the prior out instead")
        self.weight = weight

    def penalty(self, latent: Tensor) -> Tensor:
        """Return the weighted total variation."""
        images = self.images(latent)
        variation: Tensor = images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
        return self.weight * variation


class PrincipalComponents(Prior):
    """Images are the mean of public images plus a few of their principal components, with Gaussian coordinates.

    Args:
        components: largest number of components.
        weight: weight of the squared coordinates, in standard deviations.
    """

    name = "PCA"

    def __init__(self, components: int = 32, weight: float = 1e-5) -> None:
        require(components >= 1 and weight >= 0, f"Expected `components` >= 1 and `weight` >= 0 but got {components} and {weight}")
        self.components = components
        self.weight = weight

    def learn(self, images: Tensor, generator: torch.Generator) -> None:
        """Store the mean and the scaled components."""
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        _, sizes, directions = svd(flat - self.mean)
        kept = min(self.components, len(flat) - 1, int((sizes > 1e-9 * sizes[0]).sum()))
        self.basis = directions[:kept] * (sizes[:kept, None] / max(len(flat) - 1, 1) ** 0.5)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return coordinates near the mean image."""
        return 0.3 * torch.randn(count, len(self.basis), generator=generator, dtype=torch.float64).to(self.basis.device)

    def images(self, latent: Tensor) -> Tensor:
        """Return mean plus components."""
        flat: Tensor = self.mean + latent @ self.basis
        return flat.view(len(latent), *self.shape)

    def penalty(self, latent: Tensor) -> Tensor:
        """Return the weighted mean square."""
        return self.weight * latent.square().mean()


class SmallVAE(Prior):
    """Images come from the decoder of a small variational autoencoder (Kingma & Welling 2014), trained on public images.

    Args:
        latent: number of coordinates.
        width: units of the hidden layers.
        steps: training steps.
        weight: weight of the squared coordinates.
    """

    name = "VAE"

    def __init__(self, latent: int = 24, width: int = 256, steps: int = 1500, weight: float = 1e-5) -> None:
        require_counts(latent=latent, width=width, steps=steps)
        require(weight >= 0, f"Expected `weight` >= 0 but got {weight}")
        self.latent = latent
        self.width = width
        self.steps = steps
        self.weight = weight

    def learn(self, images: Tensor, generator: torch.Generator) -> None:
        """Train encoder and decoder with Adam; keep the decoder."""
        flat = images.flatten(1).float()
        encoder = small_network([flat.shape[1], self.width, 2 * self.latent], generator).to(flat.device)
        decoder = small_network([self.latent, self.width, flat.shape[1]], generator).to(flat.device)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
        for _ in range(self.steps):
            x = flat[torch.randint(len(flat), (128,), generator=generator).to(flat.device)]
            mean, log_variance = encoder(x).chunk(2, dim=1)
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            logits = decoder(mean + (log_variance / 2).exp() * noise)
            divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
            loss = F.binary_cross_entropy_with_logits(logits, x.clamp(0, 1), reduction="sum") / len(x) + 0.2 * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.decoder = decoder.double().requires_grad_(False)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return coordinates near the origin."""
        device = next(self.decoder.parameters()).device
        return 0.3 * torch.randn(count, self.latent, generator=generator, dtype=torch.float64).to(device)

    def images(self, latent: Tensor) -> Tensor:
        """Return the decoder's output."""
        pixels: Tensor = self.decoder(latent)
        return pixels.sigmoid().view(len(latent), *self.shape)

    def penalty(self, latent: Tensor) -> Tensor:
        """Return the weighted mean square."""
        return self.weight * latent.square().mean()


def small_network(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them; ``generator`` draws their weights (He et al. 2015)."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        with torch.random.fork_rng(devices=[]):  # torch draws from the global generator here; our weights are drawn below
            linear = nn.Linear(a, b)
        nn.init.normal_(linear.weight, std=(2 / a) ** 0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
