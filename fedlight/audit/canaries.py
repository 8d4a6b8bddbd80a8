"""A lower bound on epsilon from one run: canary codes that are in the sum or not, by coin toss, and guesses at which.

Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846), Theorem 5.2: of r guesses at m independent coins, an (epsilon, delta) mechanism
leaves no more right than a binomial variable of probability 1 / (1 + exp(-epsilon)) allows, plus what delta allows.
A canary is a client that sends a random code of the clip norm: the worst that the mechanism admits.
"""

from __future__ import annotations

import importlib

import torch
from scipy.stats import binom
from torch import Tensor

from fedlight.core.errors import ConfigurationError

CONFIDENCE = 0.95


def toss_canaries(
    length: int, canaries: int, noise: float, rounds: int, generator: torch.Generator, background: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scores ``[canaries]`` of canaries after ``rounds`` rounds, and whether each was in all the sums (bool).

    Clip norm 1; every round adds Gaussian noise of deviation ``noise`` to the sum of the canaries that are in and of honest clients'
    codes ``background`` ``[length]``. The score is the best linear estimate of a canary's coin.
    """
    directions = torch.randn(canaries, length, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    inside = torch.rand(canaries, generator=generator) < 0.5
    total = rounds * (inside.double() @ directions + (0 if background is None else background.double()))
    total = total + noise * rounds**0.5 * torch.randn(length, generator=generator, dtype=torch.float64)
    expected = total / rounds - directions.sum(0) / 2
    # Coins have variance 1/4; the small term keeps the system regular without noise.
    ridge = 4 * noise**2 / rounds + 1e-3
    gram = directions @ directions.T + ridge * torch.eye(canaries, dtype=torch.float64)
    return torch.linalg.solve(gram, directions @ expected), inside


def right_guesses(scores: Tensor, inside: Tensor, guesses: int) -> int:
    """Return how many of ``guesses`` guesses are right: the highest half of them are guessed in, the lowest out."""
    order = scores.argsort(descending=True)
    first, last = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int(inside[first].sum() + (~inside[last]).sum())


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the most probability that an (epsilon, delta) mechanism leaves to so many right guesses (Theorem 5.2)."""
    chance = 1 / (1 + torch.exp(torch.tensor(-epsilon, dtype=torch.float64)).item())
    tail = float(binom.sf(right - 1, guesses, chance))
    if not delta:
        return tail
    below = binom.pmf(range(right - 1, -1, -1), guesses, chance).cumsum()
    slack = max((float(mass) / (i + 1) for i, mass in enumerate(below)), default=0.0)
    return min(1.0, tail + 2 * canaries * delta * slack)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float) -> float:
    """Return the largest epsilon that so many right guesses refute with 95 % confidence, 0 if none.

    >>> round(epsilon_lower_bound(100, 100, 100, 0.0), 2)
    3.49
    >>> epsilon_lower_bound(100, 100, 50, 0.0)
    0.0
    """
    low, high = 0.0, 50.0
    if p_value(canaries, guesses, right, low, delta) > 1 - CONFIDENCE:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) <= 1 - CONFIDENCE
        low, high = (middle, high) if refuted else (low, middle)
    return low


def accountant_epsilon(noise: float, rounds: int, delta: float) -> float | None:
    """Return the epsilon that Google's ``dp-accounting`` proves for this noise in every round, None without noise.

    Raises:
        ConfigurationError: if ``dp-accounting`` is not installed.
    """
    if not noise:
        return None
    try:
        events = importlib.import_module("dp_accounting")
        losses = importlib.import_module("dp_accounting.pld")
    except ImportError as error:
        raise ConfigurationError(
            "Expected dp-accounting, which says what epsilon the noise proves, but it is not installed: pip install 'fedlight[privacy]'"
        ) from error
    accountant = losses.PLDAccountant()
    accountant.compose(events.SelfComposedDpEvent(events.GaussianDpEvent(noise), rounds))
    return float(accountant.get_epsilon(delta))
