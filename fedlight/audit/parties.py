"""Rows that are not about images: who took part (membership), and which epsilon the canaries refute.

Membership by the cosine of a candidate's own code with the sum, and by a one-tailed likelihood ratio against its scores in cohorts
without it (Carlini et al. 2022, arXiv 2112.03570, the offline attack of section VI; Li et al. 2022 for gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fedlight.audit.canaries import audited_mechanism, epsilon_lower_bound, right_guesses, toss_canaries
from fedlight.audit.plan import Canaries, Membership
from fedlight.audit.rows import Row, canary_verdict, membership_verdict
from fedlight.audit.target import Target
from fedlight.audit.views import CodeView, Observation
from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator

Scores = dict[str, tuple[Tensor, Tensor]]
"""Scores of members and of others, by name of the test."""


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


def membership_rows(
    target: Target,
    observations: list[Observation],
    settings: Membership,
    trials: int,
    seed: int,
    model: str,
    advance: Callable[[str], None],
) -> list[Row]:
    """Return two rows per observation, cosine and likelihood ratio, each with the same test on the plain update."""
    rows, scores = [], cache(lambda observation: member_scores(target, observation, trials, settings.shadows, seed))
    for observation in observations:
        advance(f"Membership on {observation.codec or 'no codec'}, {observation.words}")
        for test in ("cosine", "likelihood ratio"):
            row = Row.of(f"membership ({test})", observation, "none", model, [seed])
            try:
                members, others = scores(observation)[test]
                row.n, row.auc, row.tpr_at_1_percent_fpr = len(members), auc(members, others), tpr_at(members, others)
                row.control_auc = auc(*scores(observation.control)[test])
                row.conclusion = membership_verdict(row.auc, row.control_auc)
            except ConfigurationError as error:
                row.conclusion = f"skipped: {str(error).splitlines()[0]}"
            rows.append(row)
    return rows


def member_scores(target: Target, observation: Observation, trials: int, shadows: int, seed: int) -> Scores:
    """Return scores of the images of ``trials`` cohorts, and of equally many test images against the same sums."""
    victim, view = target.victim(None, observation), target.view(None, observation)
    generator = torch_generator(seed, "audit membership")
    context, size = target.context, observation.batch_size
    drawn = torch.randint(len(context.labels), (shadows, observation.clients - observation.known, size), generator=generator)
    shadow = torch.stack([view.observe(victim.updates(context.images[rows], context.labels[rows]), generator) for rows in drawn])
    plain: list[list[Tensor]] = [[], []]
    ratio: list[list[Tensor]] = [[], []]
    for trial in range(trials):
        images, labels = target.draw(seed, trial, observation.clients, size)
        seen = view.observe(victim.updates(images, labels), generator, observation.known)[None]
        members = (images[observation.known :].flatten(0, 1), labels[observation.known :].flatten())
        for side, (x, y) in enumerate((members, target.others(len(members[1]), seed, trial))):
            codes = torch.stack([view.predict(victim.update(a[None], b[None])[None]) for a, b in zip(x, y, strict=True)])
            cosines = cosine_scores(codes, seen)[:, 0]
            plain[side].append(cosines)
            ratio[side].append(likelihood_scores(cosines, cosine_scores(codes, shadow)))
    together = {"cosine": plain, "likelihood ratio": ratio}
    return {name: (torch.cat(lists[0]), torch.cat(lists[1])) for name, lists in together.items()}


def canary_rows(target: Target, names: list[str], settings: Canaries, seed: int, model: str) -> list[Row]:
    """Return a row for every codec and noise multiplier: the epsilon that canaries refute and the proved one."""
    rows = []
    for name in names:
        for noise in settings.noise:
            words = f"sum of {settings.count} canaries' codes" + (f" + noise z={noise:g}" if noise else "")
            row = Row("canaries", words, name, settings.count, "none", model=model, noise=noise, n=settings.count, seeds=(seed,))
            try:
                view = target.view(None, Observation(name))
                assert isinstance(view, CodeView)
                background = honest_sum(target, view, settings.honest, seed)
                row.code_dim = len(background)
                row.epsilon_lower, row.epsilon_accountant = canary_bounds(len(background), settings, noise, seed, background)
                row.conclusion = canary_verdict(row.epsilon_lower, row.epsilon_accountant)
            except ConfigurationError as error:
                row.conclusion = f"skipped: {str(error).splitlines()[0]}"
            rows.append(row)
    return rows


def canary_bounds(length: int, settings: Canaries, noise: float, seed: int, background: Tensor | None = None) -> tuple[float, float | None]:
    """Return the epsilon that a run refutes (with half as many guesses as canaries) and the one that its ledger proves."""
    generator = torch_generator(seed, "audit canaries", str(noise))
    mechanism = audited_mechanism(noise, settings.delta, settings.count + settings.honest, settings.rounds, length, seed)
    scores, inside = toss_canaries(length, settings.count, settings.rounds, generator, mechanism, background)
    guesses = max(settings.count // 2, 2)  # fixed in advance: choosing it by the outcome would void the confidence level
    lower = epsilon_lower_bound(settings.count, guesses, right_guesses(scores, inside, guesses), settings.delta)
    return lower, None if mechanism is None else mechanism.epsilon()


def honest_sum(target: Target, view: CodeView, clients: int, seed: int) -> Tensor:
    """Return the sum ``[code_dim]`` of public images' codes, each clipped to length 1."""
    observation = Observation()
    clip = target.typical_length(None, observation, view)
    victim = target.victim(None, observation)
    total = torch.zeros(view.codec.encoder.code_dim, dtype=torch.float64)
    for i in range(min(clients, len(target.context.labels))):
        code = view.observe(
            victim.update(target.context.images[i : i + 1], target.context.labels[i : i + 1])[None], torch_generator(seed, i)
        )
        total += (code / clip / (code.norm() / clip).clamp(min=1)).cpu()
    return total
