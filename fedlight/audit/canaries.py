"""A lower bound on epsilon from one run: a coin toss puts each canary code into the sum or not, and the audit guesses which are in.

Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846), Theorem 5.2: of r guesses at m independent coins under an (epsilon, delta) mechanism,
no more are right than a binomial variable of probability 1 / (1 + exp(-epsilon)) allows, plus what delta allows.
A canary is a client that sends a random code longer than the clip norm; clipping and noise are those of ``fedlight.privacy``, so the
audit finds a mechanism that clips too little or adds less noise than its ledger says.
"""

from __future__ import annotations

import torch
from scipy.stats import binom
from torch import Tensor

from fedlight.core.codec import Context
from fedlight.core.random import derive_seed
from fedlight.privacy import CentralDP
from fedlight.privacy.clipping import clip_norm
from fedlight.privacy.mechanism import AccountingSetting

CONFIDENCE = 0.95
LOUDNESS = 10.0  # length of a canary's code, in clip norms: the audit covers clipping too


def audited_mechanism(noise: float, delta: float, clients: int, rounds: int, length: int, seed: int) -> CentralDP | None:
    """Return the mechanism that canaries attack, at clip norm 1 and with every client in every round; None without noise."""
    if not noise:
        return None
    mechanism = CentralDP(clip=1.0, noise_multiplier=noise, delta=delta, simulation_seed=derive_seed(seed, "audit noise"))
    mechanism.calibrate(AccountingSetting(rate=1.0, cohort=clients, rounds=rounds, length=length, integer=False), clients)
    return mechanism


def toss_canaries(
    length: int,
    canaries: int,
    rounds: int,
    generator: torch.Generator,
    mechanism: CentralDP | None = None,
    background: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scores ``[canaries]`` of canaries after ``rounds`` rounds, and whether each was in all the sums (bool).

    Codes are clipped to norm 1; every round the mechanism adds noise to the sum of the included canaries and of honest clients' codes
    ``background`` ``[length]``, and records the release in its ledger. The score is the best linear estimate of a canary's coin.
    """
    drawn = torch.randn(canaries, length, generator=generator, dtype=torch.float64)
    loud = drawn * (LOUDNESS / drawn.norm(dim=1, keepdim=True))
    directions = torch.stack([clip_norm(code, 1.0) for code in loud])
    inside = torch.rand(canaries, generator=generator) < 0.5
    total = rounds * (inside.double() @ directions + (0 if background is None else background.double()))
    for number in range(rounds):
        if mechanism is not None:
            noise = mechanism.sum_noise(length, 1.0, Context(round=number))
            total = total + noise
            mechanism.record_release(0.0)
    expected = total / rounds - directions.sum(0) / 2
    # Coins have variance 1/4; the small term keeps the system regular without noise.
    ridge = 4 * (mechanism.multiplier if mechanism else 0.0) ** 2 / rounds + 1e-3
    gram = directions @ directions.T + ridge * torch.eye(canaries, dtype=torch.float64)
    return torch.linalg.solve(gram, directions @ expected), inside


def right_guesses(scores: Tensor, inside: Tensor, guesses: int) -> int:
    """Return how many of ``guesses`` guesses are right: "in" for the highest scores (half of the guesses), "out" for the lowest."""
    order = scores.argsort(descending=True)
    first, last = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int(inside[first].sum() + (~inside[last]).sum())


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of this many right guesses under an (epsilon, delta) mechanism (Theorem 5.2)."""
    chance = 1 / (1 + torch.exp(torch.tensor(-epsilon, dtype=torch.float64)).item())
    tail = float(binom.sf(right - 1, guesses, chance))
    if not delta:
        return tail
    below = binom.pmf(range(right - 1, -1, -1), guesses, chance).cumsum()
    slack = max((float(mass) / (i + 1) for i, mass in enumerate(below)), default=0.0)
    return min(1.0, tail + 2 * canaries * delta * slack)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float) -> float:
    """Return the largest epsilon that this many right guesses refute with 95 % confidence, 0 if none.

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
