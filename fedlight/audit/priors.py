"""What an attacker knows about images in advance: coordinates to search in, and a penalty on unlikely images."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.core.errors import require, require_counts, require_positive
from fedlight.core.linalg import eigen


class Prior(ABC):
    """A map from latent coordinates ``[n, latent]`` to images ``[n, c, h, w]`` in about 0..1, fitted to public images.

    Law: ``penalty`` is the negative log density of the coordinates (in nats, up to a constant), so that a misfit in nats plus the
    penalty has its minimum at the likeliest images (MAP).
    """

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return type(self).__name__

    def fit(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Self:
        """Return a copy fitted to public images ``[n, c, h, w]`` with labels ``[n]``."""
        fitted = copy.deepcopy(self)
        fitted.shape = tuple(images.shape[1:])
        fitted.learn(images.double(), labels, generator)
        return fitted

    def learn(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:  # noqa: B027  (a prior may have nothing to learn)
        """Adapt to public images."""

    def given(self, labels: Tensor) -> Prior:
        """Return the prior of images whose labels ``[n]`` are known."""
        return self

    @abstractmethod
    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return coordinates ``[count, latent]`` to start the search from."""

    @abstractmethod
    def images(self, latent: Tensor) -> Tensor:
        """Return the images of coordinates, differentiably."""

    @abstractmethod
    def latent(self, images: Tensor) -> Tensor:
        """Return coordinates ``[n, latent]`` whose images are these."""

    def project(self, latent: Tensor) -> None:  # noqa: B027  (only pixels have a box)
        """Clamp the coordinates to their range, in place."""

    def penalty(self, latent: Tensor) -> Tensor:
        """Return the negative log density of the coordinates, 0-d, up to a constant."""
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

    def latent(self, images: Tensor) -> Tensor:
        """Return the pixels."""
        return images.double().flatten(1)

    def project(self, latent: Tensor) -> None:
        """Keep pixels in 0..1."""
        latent.clamp_(0, 1)


class TotalVariation(Pixels):
    """Differences of neighboring pixels have a Laplace distribution, as wide as in public images.

    Total variation as in Geiping et al. 2020 (arXiv 2003.14053, Eq. 4), at its own scale.
    """

    name = "TV"

    def learn(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Store the mean absolute difference of neighbors."""
        differences = images.diff(dim=-1).numel() + images.diff(dim=-2).numel()
        self.width = (_variation(images) / max(differences, 1)).clamp(min=1e-6)

    def penalty(self, latent: Tensor) -> Tensor:
        """Return the total variation in units of the mean difference."""
        return _variation(self.images(latent)) / self.width


def _variation(images: Tensor) -> Tensor:
    variation: Tensor = images.diff(dim=-1).abs().sum() + images.diff(dim=-2).abs().sum()
    return variation


class Gaussian(Prior):
    """Images have the mean and covariance of public images; those of a known label the mean and covariance of their class.

    Coordinates are those of the principal components, in standard deviations.

    Args:
        share: share of the covariance that all classes have in common, in that of a class, which few public images tell alone.
        least: least standard deviation in any direction, in gray values.
    """

    name = "Gaussian"

    def __init__(self, share: float = 0.2, least: float = 0.01) -> None:
        require(0 < share <= 1, f"Expected `share` in (0, 1] but got {share}")
        require_positive(least=least)
        self.share = share
        self.least = least

    def learn(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Store the mean and the scaled components, of all images and of every class."""
        flat = images.flatten(1)
        mean = flat.mean(0)
        means = torch.stack([flat[labels == c].mean(0) if bool((labels == c).any()) else mean for c in range(int(labels.max()) + 1)])
        rest = flat - means[labels]
        self.everything = mean[None], self._components(flat - mean, len(flat) - 1)[None]
        common = self._components(rest, len(flat) - len(means), floor=False)
        bases = []
        for label in range(len(means)):
            own = rest[labels == label]
            share = self.share if len(own) > 1 else 1.0
            rows = torch.cat([own * ((1 - share) / max(len(own) - 1, 1)) ** 0.5, common * share**0.5])
            bases.append(self._components(rows, 1))
        self.classes = means, torch.stack(bases)
        self.chosen: Tensor | None = None

    def _components(self, rows: Tensor, weight: int, floor: bool = True) -> Tensor:
        """Return the components ``[d, d]`` of the covariance ``rows.T @ rows / weight``, each as long as its standard deviation."""
        values, directions = eigen(rows.T @ rows / max(weight, 1))
        lengths: Tensor = values.clamp(min=self.least**2 if floor else 0.0).sqrt()
        return lengths[:, None] * directions.T

    def given(self, labels: Tensor) -> Gaussian:
        """Return the prior of images with these labels."""
        prior = copy.copy(self)
        prior.chosen = labels.flatten().clamp(max=len(self.classes[0]) - 1)
        return prior

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return coordinates near the mean image."""
        basis = self.everything[1]
        return 0.3 * torch.randn(count, basis.shape[1], generator=generator, dtype=torch.float64).to(basis.device)

    def images(self, latent: Tensor) -> Tensor:
        """Return mean plus components."""
        (means, bases), which = self._which(len(latent))
        flat = latent.new_zeros(len(latent), means.shape[1])
        for label in set(which.tolist()):
            rows = (which == label).nonzero()[:, 0]
            flat = flat.index_add(0, rows, means[label] + latent[rows] @ bases[label])
        return flat.view(len(latent), *self.shape)

    def latent(self, images: Tensor) -> Tensor:
        """Return the coordinates of images."""
        (means, bases), which = self._which(len(images))
        flat = images.double().flatten(1)
        found = torch.empty_like(flat)
        for label in set(which.tolist()):
            basis, rows = bases[label], which == label
            found[rows] = (flat[rows] - means[label]) @ (basis / basis.square().sum(1, keepdim=True)).T
        return found

    def _which(self, count: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return means and bases, and the index of each image's."""
        if self.chosen is None:
            return self.everything, torch.zeros(count, dtype=torch.long, device=self.everything[0].device)
        return self.classes, self.chosen

    def penalty(self, latent: Tensor) -> Tensor:
        """Return half the sum of squares."""
        return 0.5 * latent.square().sum()


class SmallVAE(Prior):
    """Images come from the decoder of a small variational autoencoder (Kingma & Welling 2014), trained on public images.

    What it cannot draw is one more coordinate a pixel, as large as the decoder's error on public images.

    Args:
        latent: number of the autoencoder's coordinates.
        width: units of the hidden layers.
        steps: training steps.
    """

    name = "VAE"

    def __init__(self, latent: int = 24, width: int = 256, steps: int = 1500) -> None:
        require_counts(latent=latent, width=width, steps=steps)
        self.size = latent
        self.width = width
        self.steps = steps

    def learn(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Train encoder and decoder with Adam, and measure the decoder's error."""
        flat = images.flatten(1).float()
        encoder = small_network([flat.shape[1], self.width, 2 * self.size], generator).to(flat.device)
        decoder = small_network([self.size, self.width, flat.shape[1]], generator).to(flat.device)
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
        self.encoder, self.decoder = (part.double().requires_grad_(False) for part in (encoder, decoder))
        self.error = (self._drawn(self._encoded(images)) - images.flatten(1)).square().mean(0).sqrt().clamp(min=0.01)

    def _encoded(self, images: Tensor) -> Tensor:
        mean: Tensor = self.encoder(images.double().flatten(1))[:, : self.size]
        return mean

    def _drawn(self, coordinates: Tensor) -> Tensor:
        logits: Tensor = self.decoder(coordinates)
        return logits.sigmoid()

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return coordinates near the origin."""
        drawn = 0.3 * torch.randn(count, self.size, generator=generator, dtype=torch.float64).to(self.error)
        return torch.cat([drawn, drawn.new_zeros(count, len(self.error))], dim=1)

    def images(self, latent: Tensor) -> Tensor:
        """Return the decoder's output plus what it cannot draw."""
        drawn = self._drawn(latent[:, : self.size]) + self.error * latent[:, self.size :]
        return drawn.view(len(latent), *self.shape)

    def latent(self, images: Tensor) -> Tensor:
        """Return the encoder's coordinates, and the error that is left."""
        coordinates = self._encoded(images)
        return torch.cat([coordinates, (images.double().flatten(1) - self._drawn(coordinates)) / self.error], dim=1)

    def penalty(self, latent: Tensor) -> Tensor:
        """Return half the sum of squares."""
        return 0.5 * latent.square().sum()


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
