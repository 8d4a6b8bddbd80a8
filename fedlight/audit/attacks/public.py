"""What an attacker learns from public images: it computes their messages itself, and compares them with what it saw.

Labels by likelihood: messages of a class have a normal distribution around the class's mean, with a covariance that all classes share
(Fisher's discriminant analysis); messages in a sum add up, and so do their means and covariances.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.audit.attacks.base import Attack, Case, Guess
from fedlight.audit.victim import Victim
from fedlight.audit.views import View
from fedlight.core.linalg import eigen

MOST_IMAGES = 1000
MOST_NUMBERS = 20_000_000  # of all messages together: 160 MB
DIRECTIONS = 60  # directions of largest variance that labels are read from
SWEEPS = 10  # of coordinate descent; it nearly always ends before

_computed: weakref.WeakKeyDictionary[View, tuple[weakref.ref[Victim], Tensor]] = weakref.WeakKeyDictionary()


def public_messages(case: Case) -> Tensor:
    """Return the expected message of each of the first public images, alone at a client, ``[n, length]``; computed once for a view."""
    known = _computed.get(case.view)
    if known is None or known[0]() is not case.victim:
        context = case.context
        count = min(MOST_IMAGES, max(MOST_NUMBERS // max(len(case.seen), 1), 20), len(context.labels))
        with torch.no_grad():
            messages = torch.stack(
                [case.view.predict(_alone(case, context.images[i : i + 1], context.labels[i : i + 1])) for i in range(count)]
            )
        known = (weakref.ref(case.victim), messages)
        _computed[case.view] = known
    return known[1]


def _alone(case: Case, image: Tensor, label: Tensor) -> Tensor:
    with torch.enable_grad():  # an update is a gradient itself
        return case.victim.update(image, label, unroll=False)[None]


@dataclass(frozen=True)
class ClassModel:
    """Normal distributions of messages, in coordinates in which the noise of ``seen`` has variance 1."""

    means: Tensor  # of every class, [classes, k]
    covariance: Tensor  # of a message of any class, [k, k]
    seen: Tensor  # the observation, [k], times the number of messages in it

    @classmethod
    def of(cls, case: Case) -> ClassModel:
        """Fit it to public messages, in their directions of largest variance relative to the known noise."""
        messages, count = public_messages(case), case.count
        deviation = case.deviation * count
        labels, classes = case.context.labels[: len(messages)], case.context.classes
        middle = messages.mean(0)
        centered = (messages - middle) / deviation
        values, vectors = eigen(centered @ centered.T)  # there are fewer messages than numbers in one
        kept = min(DIRECTIONS, max(len(messages) // 3, 1), int((values > 1e-9 * values[0]).sum()))
        directions = (centered.T @ (vectors[:, :kept] / values[:kept].sqrt())).T
        coordinates = centered @ directions.T
        means = torch.stack(
            [coordinates[labels == c].mean(0) if bool((labels == c).any()) else coordinates.mean(0) for c in range(classes)]
        )
        rest = coordinates - means[labels]
        covariance = rest.T @ rest / max(len(rest) - classes, 1)
        return cls(means, covariance, ((count * case.seen - count * middle) / deviation) @ directions.T)

    def likeliest(self, count: int) -> Tensor:
        """Return labels ``[count]`` of large likelihood: one after the other, until no single change helps."""
        labels = torch.zeros(0, dtype=torch.long, device=self.means.device)
        for _ in range(count):
            labels = torch.cat([labels, labels.new_zeros(1)])
            labels = self._improve(labels, [len(labels) - 1])
        for _ in range(SWEEPS):
            better = self._improve(labels, range(count))
            if torch.equal(better, labels):
                break
            labels = better
        return labels

    def _improve(self, labels: Tensor, places: range | list[int]) -> Tensor:
        """Return the labels after each place in turn has its likeliest label."""
        labels = labels.clone()
        whole = len(labels) * self.covariance + torch.eye(len(self.covariance)).to(self.covariance)
        factor = torch.linalg.cholesky(whole)
        means, seen = (torch.linalg.solve_triangular(factor, part.T, upper=False).T for part in (self.means, self.seen[None]))
        for place in places:
            others = means[labels].sum(0) - means[labels[place]]
            labels[place] = (seen - others - means).square().sum(1).argmin()
        return labels


class LikelyLabels(Attack):
    """Reads labels by their likelihood, given the messages of public images and the known noise.

    It needs no gradient of the last layer and no bias, and works where iDLG's signs drown in rounding or noise. No pixels.
    """

    name = "labels by likelihood"
    needs_gradients = False

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the labels ``[n]``."""
        return Guess(labels=ClassModel.of(case).likeliest(case.count))


def likely_images(case: Case, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return public images ``[n, c, h, w]`` with labels ``[n]`` that together explain the observation well.

    Coordinate descent from random images of the classes: each in turn is replaced by the one that leaves the least error, relative to
    the known noise and to how messages of one class differ.
    """
    messages, known = public_messages(case), case.context.labels
    own = known[: len(messages)]
    everyone = torch.arange(len(messages), device=messages.device)
    choices = [rows if len(rows := (own == label).nonzero()[:, 0]) else everyone for label in labels]
    spread = torch.stack([(messages[own == c] - messages[own == c].mean(0)).square().mean(0) for c in set(own.tolist())]).mean(0)
    count = len(labels)
    weight = (spread / count + case.deviation.square()).rsqrt() / count
    weighed, target = messages * weight, count * case.seen * weight
    chosen = torch.stack([rows[int(torch.randint(len(rows), (1,), generator=generator))] for rows in choices])
    total = weighed[chosen].sum(0)
    for _ in range(SWEEPS):
        before = chosen.clone()
        for place, rows in enumerate(choices):
            others = total - weighed[chosen[place]]
            chosen[place] = rows[(target - others - weighed[rows]).square().sum(1).argmin()]
            total = others + weighed[chosen[place]]
        if torch.equal(before, chosen):
            break
    return case.context.images[chosen]
