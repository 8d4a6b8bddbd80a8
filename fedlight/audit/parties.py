"""Rows that are not about images: who took part (membership), and what epsilon is refuted (canaries)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlight.audit.canaries import audited_mechanism, epsilon_lower_bound, right_guesses, toss_canaries
from fedlight.audit.membership import auc, cosine_scores, likelihood_scores, tpr_at
from fedlight.audit.plan import Canaries, Membership
from fedlight.audit.rows import Row, canary_verdict, membership_verdict
from fedlight.audit.subject import Subject
from fedlight.audit.views import CodeView, Sight
from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator

Scores = dict[str, tuple[Tensor, Tensor]]
"""By name of the test: scores of members and of others."""


def membership_rows(
    subject: Subject, sights: list[Sight], settings: Membership, trials: int, seed: int, model: str, advance: Callable[[str], None]
) -> list[Row]:
    """Return two rows a sight, cosine and likelihood ratio, each beside the same test on the plain update."""
    rows, known = [], dict[Sight, Scores]()

    def scores(sight: Sight) -> Scores:
        if sight not in known:
            known[sight] = member_scores(subject, sight, trials, settings.shadows, seed)
        return known[sight]

    for sight in sights:
        advance(f"Membership on {sight.codec or 'no codec'}, {sight.words}")
        for test in ("cosine", "likelihood ratio"):
            row = Row(f"membership ({test})", sight.words, sight.codec or "none", sight.clients, "none", model=model, seeds=(seed,))
            row.batch_size, row.local_steps, row.noise = sight.batch_size, sight.local_steps, sight.noise
            try:
                members, others = scores(sight)[test]
                row.n, row.auc, row.tpr_at_1_percent_fpr = len(members), auc(members, others), tpr_at(members, others)
                row.control_auc = auc(*scores(sight.control)[test])
                row.conclusion = membership_verdict(row.auc, row.control_auc)
            except ConfigurationError as error:
                row.conclusion = f"skipped: {str(error).splitlines()[0]}"
            rows.append(row)
    return rows


def member_scores(subject: Subject, sight: Sight, trials: int, shadows: int, seed: int) -> Scores:
    """Return scores of the images of ``trials`` cohorts, and of as many test images against the same sums."""
    victim, view = subject.victim(None, sight), subject.view(None, sight)
    generator = torch_generator(seed, "audit membership")
    context, size = subject.context, sight.batch_size
    drawn = torch.randint(len(context.labels), (shadows, sight.clients, size), generator=generator)
    shadow = torch.stack([view.observe(victim.updates(context.images[rows], context.labels[rows]), generator) for rows in drawn])
    plain: list[list[Tensor]] = [[], []]
    ratio: list[list[Tensor]] = [[], []]
    for trial in range(trials):
        images, labels = subject.draw(seed, trial, sight.clients, size)
        seen = view.observe(victim.updates(images, labels), generator)[None]
        members = (images.flatten(0, 1), labels.flatten())
        for side, (x, y) in enumerate((members, subject.others(len(members[1]), seed, trial))):
            codes = torch.stack([view.predict(victim.update(a[None], b[None])[None]) for a, b in zip(x, y, strict=True)])
            cosines = cosine_scores(codes, seen)[:, 0]
            plain[side].append(cosines)
            ratio[side].append(likelihood_scores(cosines, cosine_scores(codes, shadow)))
    together = {"cosine": plain, "likelihood ratio": ratio}
    return {name: (torch.cat(lists[0]), torch.cat(lists[1])) for name, lists in together.items()}


def canary_rows(subject: Subject, names: list[str], settings: Canaries, seed: int, model: str) -> list[Row]:
    """Return a row for every codec and noise multiplier: the epsilon that canaries refute, beside the one that is proved."""
    rows = []
    for name in names:
        for noise in settings.noise:
            words = f"sum of {settings.count} canaries' codes" + (f" + noise z={noise:g}" if noise else "")
            row = Row("canaries", words, name, settings.count, "none", model=model, noise=noise, n=settings.count, seeds=(seed,))
            try:
                view = subject.view(None, Sight(name))
                assert isinstance(view, CodeView)
                background = honest_sum(subject, view, settings.honest, seed)
                row.code_dim = len(background)
                row.epsilon_lower, row.epsilon_accountant = canary_bounds(len(background), settings, noise, seed, background)
                row.conclusion = canary_verdict(row.epsilon_lower, row.epsilon_accountant)
            except ConfigurationError as error:
                row.conclusion = f"skipped: {str(error).splitlines()[0]}"
            rows.append(row)
    return rows


def canary_bounds(length: int, settings: Canaries, noise: float, seed: int, background: Tensor | None = None) -> tuple[float, float | None]:
    """Return the epsilon that a run refutes, at half as many guesses as there are canaries, and the one that its ledger proves."""
    generator = torch_generator(seed, "audit canaries", str(noise))
    mechanism = audited_mechanism(noise, settings.delta, settings.count + settings.honest, settings.rounds, length, seed)
    scores, inside = toss_canaries(length, settings.count, settings.rounds, generator, mechanism, background)
    guesses = max(settings.count // 2, 2)  # fixed beforehand: choosing it by the outcome would spoil the confidence
    lower = epsilon_lower_bound(settings.count, guesses, right_guesses(scores, inside, guesses), settings.delta)
    return lower, None if mechanism is None else mechanism.epsilon()


def honest_sum(subject: Subject, view: CodeView, clients: int, seed: int) -> Tensor:
    """Return the sum ``[code_dim]`` of public images' codes, each scaled to at most length 1."""
    sight = Sight()
    clip = subject.typical_length(None, sight, view)
    victim = subject.victim(None, sight)
    total = torch.zeros(view.codec.encoder.code_dim, dtype=torch.float64)
    for i in range(min(clients, len(subject.context.labels))):
        code = view.observe(
            victim.update(subject.context.images[i : i + 1], subject.context.labels[i : i + 1])[None], torch_generator(seed, i)
        )
        total += (code / clip / (code.norm() / clip).clamp(min=1)).cpu()
    return total
