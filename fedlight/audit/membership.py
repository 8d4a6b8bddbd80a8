"""Was an image in the cohort? Scores of candidates against observations, and how well they separate members from others.

Cosine of a candidate's own code with the sum, and a one-tailed likelihood ratio against its scores in cohorts without it
(Carlini et al. 2022, arXiv 2112.03570, the offline attack of section VI; Li et al. 2022 for gradients).
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_scores(candidates: Tensor, seen: Tensor) -> Tensor:
    """Return the cosines ``[n, m]`` between candidates' codes ``[n, length]`` and observations ``[m, length]``."""
    cosines: Tensor = unit(candidates) @ unit(seen).T
    return cosines


def unit(rows: Tensor) -> Tensor:
    """Return the rows scaled to length 1; zero rows stay zero."""
    length: Tensor = rows.norm(dim=-1, keepdim=True)
    scaled: Tensor = rows / length.clamp(min=1e-30)
    return scaled


def likelihood_scores(scores: Tensor, outside: Tensor) -> Tensor:
    """Return the log probability ``[n]`` that scores ``[n]`` exceed those in cohorts without the candidate, ``[n, shadows]``.

    Each candidate has a normal distribution, fitted to its scores in shadow cohorts.
    """
    mean, deviation = outside.mean(1), outside.std(1).clamp(min=1e-9)
    ratio: Tensor = torch.special.log_ndtr((scores - mean) / deviation)
    return ratio


def auc(members: Tensor, others: Tensor) -> float:
    """Return the probability that a member's score exceeds a non-member's; ties count half.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    difference = members[:, None] - others[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def tpr_at(members: Tensor, others: Tensor, fpr: float = 0.01) -> float:
    """Return the share of members above the threshold that at most a share ``fpr`` of the others exceeds.

    >>> tpr_at(torch.tensor([0.5, 3.0]), torch.linspace(0, 1, 100))
    0.5
    """
    allowed = int(fpr * len(others))
    threshold = others.sort(descending=True).values[allowed]
    return float((members > threshold).double().mean())
