"""Was an image in the cohort? Scores of candidates against what was seen, and how well they tell members from others.

Cosine of a candidate's own code with the sum, and a one-tailed likelihood ratio against its scores in cohorts that it was not in
(Carlini et al. 2022, arXiv 2112.03570, the offline attack of section VI; Li et al. 2022 for gradients).
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_scores(candidates: Tensor, seen: Tensor) -> Tensor:
    """Return the cosines ``[n, m]`` of candidates' codes ``[n, length]`` with observations ``[m, length]``."""
    cosines: Tensor = unit(candidates) @ unit(seen).T
    return cosines


def unit(rows: Tensor) -> Tensor:
    """Return the rows at length 1; zeros stay."""
    length: Tensor = rows.norm(dim=-1, keepdim=True)
    scaled: Tensor = rows / length.clamp(min=1e-30)
    return scaled


def likelihood_scores(scores: Tensor, outside: Tensor) -> Tensor:
    """Return the log probability ``[n]`` that scores ``[n]`` are above those of cohorts without the candidate, ``[n, shadows]``.

    A normal distribution for each candidate, of its scores in shadow cohorts.
    """
    mean, deviation = outside.mean(1), outside.std(1).clamp(min=1e-9)
    ratio: Tensor = torch.special.log_ndtr((scores - mean) / deviation)
    return ratio


def auc(members: Tensor, others: Tensor) -> float:
    """Return the probability that a member's score is above another's, ties counted half.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    difference = members[:, None] - others[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def tpr_at(members: Tensor, others: Tensor, fpr: float = 0.01) -> float:
    """Return the share of members above the threshold that at most a share ``fpr`` of the others is above.

    >>> tpr_at(torch.tensor([0.5, 3.0]), torch.linspace(0, 1, 100))
    0.5
    """
    allowed = int(fpr * len(others))
    threshold = others.sort(descending=True).values[allowed]
    return float((members > threshold).double().mean())
