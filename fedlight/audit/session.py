"""An audit in progress: every attack on every sight, each beside the same attack on the plain update."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from fedlight.audit.attacks import Attack, Case
from fedlight.audit.controls import Controls
from fedlight.audit.metrics import identification_rate, matched, psnr, ssim
from fedlight.audit.plan import Audit, Parts
from fedlight.audit.rows import Row, inversion_verdict, label_verdict
from fedlight.audit.subject import Subject
from fedlight.audit.views import CodeView, NoisyView, Sight
from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator

POOL = 100
"""Images of others that an image is looked for among, where its identification is measured."""


@dataclass
class Result:
    """What an attack got on one sight, over all cohorts.

    Attributes:
        psnr: of every image, ``[n]``; empty for attacks on labels.
        ssim: the same.
        firsts: the first image of every cohort, ``[cohorts, c, h, w]``.
        first_psnr: its PSNR.
        truth: the true ones.
        labels: share of labels that are right, if the attack says labels.
        found: identification rate.
        baselines: PSNRs of guesses without looking, by name.
        seconds: time of all.
    """

    psnr: Tensor
    ssim: Tensor
    firsts: Tensor
    first_psnr: list[float]
    truth: Tensor
    labels: float | None
    found: float | None
    baselines: dict[str, float]
    seconds: float


class Session:
    """Runs attacks and keeps the results on plain updates, which several sights are compared with.

    Args:
        audit: the settings.
        parts: what the base configuration makes.
        advance: called with words after every cohort that was attacked.
    """

    def __init__(self, audit: Audit, parts: Parts, advance: Callable[[str], None]) -> None:
        self.audit = audit
        self.parts = parts
        self.advance = advance
        self.rows: list[Row] = []
        self.shown: list[tuple[Row, Result, Result]] = []
        self._results: dict[tuple[str, int, Sight], Result] = {}

    def run(self, subject: Subject, model: str) -> None:
        """Try every attack on every sight of one model; what cannot be run becomes a row that says why."""
        controls = Controls.of(subject.context.images, subject.context.labels, subject.context.classes)
        for number, attack in enumerate(self.audit.tried):
            prepared = attack.prepare(subject.context, torch_generator(self.parts.seed, "audit prior", number))
            for sight in self.audit.sights:
                row = Row(attack.name, sight.words, sight.codec or "none", sight.clients, attack.prior.name, model=model)
                row = replace(row, batch_size=sight.batch_size, local_steps=sight.local_steps, noise=sight.noise)
                row.seeds = tuple(self.audit.seeds)
                try:
                    control = self._result(subject, controls, prepared, number, sight.control, model)
                    result = self._result(subject, controls, prepared, number, sight, model)
                except (ConfigurationError, MemoryError, torch.OutOfMemoryError) as error:
                    row.conclusion = f"skipped: {str(error).splitlines()[0]}"
                    self.rows.append(row)
                    self.advance("")
                    continue
                view = subject.view(attack, sight)
                code = view.view if isinstance(view, NoisyView) else view
                if isinstance(code, CodeView):
                    row.code_dim = code.codec.encoder.code_dim
                    row.message_ratio = 4 * code.codec.encoder.dim / code.codec.encoder.format.payload_bytes
                self.rows.append(fill(row, result, control, most_common(subject.context.labels), sight == sight.control))
                self.shown.append((row, result, control))
                self.advance("")

    def _result(self, subject: Subject, controls: Controls, attack: Attack, number: int, sight: Sight, model: str) -> Result:
        key = (model, number, sight)
        if key not in self._results:
            self._results[key] = self._attack(subject, controls, attack, sight)
        return self._results[key]

    def _attack(self, subject: Subject, controls: Controls, attack: Attack, sight: Sight) -> Result:
        victim, view = subject.victim(attack, sight), subject.view(attack, sight)
        collected: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        labels, found = [], []
        baselines: dict[str, list[Tensor]] = {}
        start = time.monotonic()
        for seed in self.audit.seeds:
            for trial in range(self.audit.cohorts):
                self.advance(f"{attack.name} ({attack.prior.name}) on {sight.codec or 'no codec'}, {sight.words}: cohort {trial + 1}")
                images, truth = subject.draw(seed, trial, sight.clients, sight.batch_size)
                self._check_memory(victim.bytes_per_image(images.flatten(0, 1)), sight, attack)
                seen = view.observe(victim.updates(images, truth), torch_generator(seed, "audit seen", trial))
                case = Case(victim, view, seen, truth, subject.context)
                attack.check(case)
                guess = attack.run(case, torch_generator(seed, "audit attack", trial))
                true = images.flatten(0, 1)
                if guess.labels is not None:
                    labels.append(overlap(guess.labels, truth.flatten()))
                if guess.images is not None:
                    got = matched(guess.images.float(), true)
                    collected.append((psnr(got, true), ssim(got, true), got[:1], true[:1]))
                    found.append(identification_rate(got, true, subject.others(POOL, seed, trial)[0]))
                for name, blind in controls.guesses(truth.flatten()).items():
                    baselines.setdefault(name, []).append(psnr(matched(blind, true), true))
        quality, alike, got_first, true_first = (
            [torch.cat(part) for part in zip(*collected, strict=True)] if collected else [torch.zeros(0)] * 4
        )
        firsts = [float(item[0][0]) for item in collected]
        blinds = {name: float(torch.cat(values).median()) for name, values in baselines.items()}
        seconds = time.monotonic() - start
        told = fmean(labels) if labels else None
        return Result(quality, alike, got_first, firsts, true_first, told, fmean(found) if found else None, blinds, seconds)

    def _check_memory(self, per_image: int, sight: Sight, attack: Attack) -> None:
        needed = 3 * per_image * sight.clients * sight.batch_size * sight.local_steps
        if attack.needs_gradients and needed > self.audit.memory_bytes:
            raise MemoryError(
                f"about {needed / 2**20:,.0f} MiB would be needed for {sight.clients} x {sight.batch_size} images and "
                f"{sight.local_steps} steps, and `memory_mb` allows {self.audit.memory_bytes / 2**20:,.0f}"
            )


def fill(row: Row, result: Result, control: Result, chance: float, plain: bool) -> Row:
    """Write an attack's figures, its control's and the baselines' into a row, and what may be concluded."""
    row.seconds = round(result.seconds, 2)
    row.label_accuracy, row.label_chance = result.labels, chance if result.labels is not None else None
    if not len(result.psnr):
        assert result.labels is not None
        assert control.labels is not None
        row.n = 0
        row.conclusion = label_verdict(result.labels, control.labels, chance)
        return row
    row.n = len(result.psnr)
    row.psnr_median, row.psnr_best, row.psnr_worst = (float(f(result.psnr)) for f in (torch.median, torch.max, torch.min))
    row.ssim_median = float(result.ssim.median())
    row.control_psnr = float(control.psnr.median())
    row.identified = result.found
    row.mean_image_psnr, row.class_mean_psnr = result.baselines["mean_image"], result.baselines["class_mean"]
    row.label_only_psnr = result.baselines["label_only"]
    row.gain = row.psnr_median - row.class_mean_psnr
    row.conclusion = inversion_verdict(row.psnr_median, row.psnr_best, row.control_psnr, row.class_mean_psnr, plain)
    return row


def overlap(guess: Tensor, truth: Tensor) -> float:
    """Return the share of labels ``[n]`` that are right, whatever their order.

    >>> overlap(torch.tensor([1, 1, 2, 3]), torch.tensor([3, 1, 0, 0]))
    0.5
    """
    classes = int(max(guess.max(), truth.max())) + 1
    counts = [torch.bincount(labels.cpu(), minlength=classes) for labels in (guess, truth)]
    return float(torch.minimum(*counts).sum() / len(truth))


def most_common(labels: Tensor) -> float:
    """Return the share of the most common label: what guessing gets of a single one."""
    return float(torch.bincount(labels.cpu()).max() / len(labels))


def number_of_cohorts(audit: Audit, models: int) -> int:
    """Return how many times a sight is attacked, for a progress bar."""
    return models * len(audit.tried) * len(audit.sights)
