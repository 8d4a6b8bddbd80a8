"""An audit in progress: every attack on every observation, each compared with the same attack on the plain update."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean

import torch
from torch import Tensor

from fedlight.audit.attacks import Attack, Case
from fedlight.audit.metrics import Controls, identification_rate, matched, psnr, ssim
from fedlight.audit.plan import Audit, Parts
from fedlight.audit.rows import Row, inversion_verdict, label_verdict
from fedlight.audit.target import Target
from fedlight.audit.views import CodeView, NoisyView, Observation, RoundsView
from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator

POOL = 100
"""Number of other images in the pool for the identification rate."""


@dataclass
class Result:
    """The results of an attack on one observation, over all cohorts."""

    psnr: Tensor  # of every image, [n]; empty for attacks on labels
    ssim: Tensor  # of every image, [n]
    firsts: Tensor  # the attack's first image of every cohort, [cohorts, c, h, w]
    first_psnr: list[float]
    truth: Tensor  # the true images that belong to the first ones
    labels: float | None  # share of correct labels, if the attack infers labels
    found: float | None  # identification rate
    baselines: dict[str, float]  # PSNRs of guesses that see no message, by name
    seconds: float


class Session:
    """Runs attacks; ``advance`` is called with words before every cohort, and without words after every attack."""

    def __init__(self, audit: Audit, parts: Parts, advance: Callable[[str], None]) -> None:
        self.audit = audit
        self.parts = parts
        self.advance = advance
        self.rows: list[Row] = []
        self.shown: list[tuple[Row, Result, Result]] = []

    def run(self, target: Target, model: str) -> None:
        """Run every attack on every observation of one model; an attack that cannot run becomes a row that says why."""
        controls = Controls.of(target.context.images, target.context.labels, target.context.classes)
        for number, attack in enumerate(self.audit.tried):
            prepared = attack.prepare(target.context, torch_generator(self.parts.seed, "audit prior", number))
            results = cache(partial(self._attack, target, controls, prepared))  # several observations have one control
            for observation in self.audit.observations:
                row = Row.of(attack.name, observation, attack.prior.name, model, self.audit.seeds)
                self.rows.append(row)
                try:
                    control, result = results(observation.control), results(observation)
                except (ConfigurationError, MemoryError, torch.OutOfMemoryError) as error:
                    row.conclusion = f"skipped: {str(error).splitlines()[0]}"
                    self.advance("")
                    continue
                view = target.view(attack, observation)
                code = view
                while isinstance(code, (NoisyView, RoundsView)):
                    code = code.view
                if isinstance(code, CodeView):
                    row.code_dim = code.codec.encoder.code_dim
                    if code.codec.fixed_width:
                        row.message_ratio = 4 * code.codec.encoder.dim / code.codec.encoder.format.payload_bytes
                fill(row, result, control, most_common(target.context.labels), observation == observation.control)
                self.shown.append((row, result, control))
                self.advance("")

    def _attack(self, target: Target, controls: Controls, attack: Attack, observation: Observation) -> Result:
        victim, view = target.victim(attack, observation), target.view(attack, observation)
        collected: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        labels, found = [], []
        baselines: dict[str, list[Tensor]] = {}
        start = time.monotonic()
        for seed in self.audit.seeds:
            for trial in range(self.audit.cohorts):
                self.advance(
                    f"{attack.name} ({attack.prior.name}) on {observation.codec or 'no codec'}, {observation.words}: cohort {trial + 1}"
                )
                images, truth = target.draw(seed, trial, observation.clients, observation.batch_size)
                self._check_memory(victim.bytes_per_image(images.flatten(0, 1)), observation, attack)
                seen = view.observe(victim.updates(images, truth), torch_generator(seed, "audit seen", trial), observation.known)
                images, truth = images[observation.known :], truth[observation.known :]
                case = Case(victim, view, seen, truth, target.context)
                attack.check(case)
                guess = attack.run(case, torch_generator(seed, "audit attack", trial))
                true = images.flatten(0, 1)
                if guess.labels is not None:
                    labels.append(overlap(guess.labels, truth.flatten()))
                if guess.images is not None:
                    got = matched(guess.images.float(), true)
                    collected.append((psnr(got, true), ssim(got, true), got[:1], true[:1]))
                    found.append(identification_rate(got, true, target.others(POOL, seed, trial)[0]))
                for name, blind in controls.guesses(truth.flatten()).items():
                    baselines.setdefault(name, []).append(psnr(matched(blind, true), true))
        quality, alike, got_first, true_first = (
            [torch.cat(part) for part in zip(*collected, strict=True)] if collected else [torch.zeros(0)] * 4
        )
        firsts = [float(item[0][0]) for item in collected]
        blinds = {name: float(torch.cat(values).median()) for name, values in baselines.items()}
        seconds = time.monotonic() - start
        right = fmean(labels) if labels else None
        return Result(quality, alike, got_first, firsts, true_first, right, fmean(found) if found else None, blinds, seconds)

    def _check_memory(self, per_image: int, observation: Observation, attack: Attack) -> None:
        needed = 3 * per_image * observation.clients * observation.batch_size * observation.local_steps
        if attack.needs_gradients and needed > self.audit.memory_bytes:
            raise MemoryError(
                f"about {needed / 2**20:,.0f} MiB would be needed for {observation.clients} x {observation.batch_size} images and "
                f"{observation.local_steps} steps, and `memory_mb` allows {self.audit.memory_bytes / 2**20:,.0f}"
            )


def fill(row: Row, result: Result, control: Result, chance: float, plain: bool) -> Row:
    """Write the metrics of an attack, its control and the baselines into a row, and the conclusion."""
    row.seconds = round(result.seconds, 2)
    row.label_accuracy, row.label_chance = result.labels, chance if result.labels is not None else None
    if not len(result.psnr):
        assert result.labels is not None
        assert control.labels is not None
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
    """Return the share of correct labels ``[n]``, in any order.

    >>> overlap(torch.tensor([1, 1, 2, 3]), torch.tensor([3, 1, 0, 0]))
    0.5
    """
    classes = int(max(guess.max(), truth.max())) + 1
    counts = [torch.bincount(labels.cpu(), minlength=classes) for labels in (guess, truth)]
    return float(torch.minimum(*counts).sum() / len(truth))


def most_common(labels: Tensor) -> float:
    """Return the share of the most common label: the accuracy of guessing a single label."""
    return float(torch.bincount(labels.cpu()).max() / len(labels))
