"""The rows of an audit, and the conclusion that each allows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from fedlight.audit.views import Observation

SUCCESS = 3.0
"""dB over the class mean from which an attack counts as working: below that, it may know no more than the label."""

HEADS = ("model", "attack", "sees", "codec", "prior", "median", "best", "control", "mean image", "class mean", "conclusion")

READING = """\
How to read this. PSNR is in dB, between the attack's images and the true ones matched to them; `class mean` is the PSNR of guessing the
average image of the class, which needs only the label. Only what an attack gets beyond that is a leak, and only an attack that works on
the plain update (`control`, same budget, same images) shows anything: if it does not work there, the row says "no conclusion". A row
without a leak says that *this* attack, at *this* budget, with *this* prior, got nothing on *these* few images; it does not prove that
another would get nothing. A codec is compression, not encryption: a better prior, more rounds or more computing time can only help the
attacker. Attacks know how much rounding or noise to expect in each number, and weigh residuals by it. Averaging over more clients makes
inversion harder and proves nothing either. Proofs exist for secure aggregation (the server sees only the sum) and differential privacy (a
bound on what any attack can learn); canaries bound epsilon from below, and a low bound is no evidence of privacy. Clients' networks run
without dropout and with global BatchNorm statistics, and each client trains on all its images in every step: all of
this favors the attacker.
"""


@dataclass
class Row:
    """One attack on one observation: metrics are None where they do not apply; medians of an even number are the lower middle value."""

    attack: str
    sees: str
    codec: str
    clients: int
    prior: str
    psnr_median: float | None = None
    psnr_best: float | None = None
    psnr_worst: float | None = None
    ssim_median: float | None = None
    control_psnr: float | None = None
    mean_image_psnr: float | None = None
    class_mean_psnr: float | None = None
    label_only_psnr: float | None = None
    gain: float | None = None
    identified: float | None = None
    label_accuracy: float | None = None
    label_chance: float | None = None
    auc: float | None = None
    tpr_at_1_percent_fpr: float | None = None
    control_auc: float | None = None
    epsilon_lower: float | None = None
    epsilon_accountant: float | None = None
    model: str = "initial"
    batch_size: int = 1
    local_steps: int = 1
    noise: float = 0.0
    code_dim: int | None = None
    message_ratio: float | None = None
    n: int = 0
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0
    conclusion: str = ""

    @classmethod
    def of(cls, attack: str, seen: Observation, prior: str, model: str, seeds: Sequence[int]) -> Row:
        """Return the row of an attack on an observation, without results."""
        row = cls(attack, seen.words, seen.codec or "none", seen.clients, prior, model=model, seeds=tuple(seeds))
        row.batch_size, row.local_steps, row.noise = seen.batch_size, seen.local_steps, seen.noise
        return row

    @property
    def skipped(self) -> bool:
        """Whether the attack was not run."""
        return self.conclusion.startswith("skipped")


def inversion_verdict(median: float, best: float, control: float, class_mean: float, plain: bool) -> str:
    """Return the conclusion of an inversion row from PSNRs in dB: of the attack, its positive control, and the class mean.

    >>> inversion_verdict(12.0, 13.0, 14.0, 13.0, plain=False)
    'no conclusion: the same attack fails on the plain update'
    """
    if not control - class_mean >= SUCCESS:
        return (
            "no conclusion: the attack fails on the plain update" if plain else "no conclusion: the same attack fails on the plain update"
        )
    if median - class_mean >= SUCCESS:
        return f"leaks: {median - class_mean:+.1f} dB over the class mean"
    if best - class_mean >= SUCCESS:
        return f"leaks in the best case: {best - class_mean:+.1f} dB over the class mean, {median - class_mean:+.1f} in the median"
    return f"this attack got {median - class_mean:+.1f} dB over the class mean: less than the 3 dB that count as a leak, at this budget"


def label_verdict(accuracy: float, control: float, chance: float) -> str:
    """Return the conclusion of a row on labels, from shares of correct labels."""
    if control < chance + 0.2:
        return "no conclusion: the attack cannot read labels from the plain update either"
    if accuracy >= chance + 0.2:
        return f"labels leak: {accuracy:.0%} right where guessing gets {chance:.0%}"
    return f"this attack got {accuracy:.0%} of the labels, guessing {chance:.0%}"


def membership_verdict(auc: float, control: float) -> str:
    """Return the conclusion of a row on membership, from areas under the ROC curve."""
    if control < 0.6:
        return "no conclusion: the attack cannot tell members apart in the plain update either"
    return f"membership leaks: AUC {auc:.2f}" if auc >= 0.6 else f"this attack got an AUC of {auc:.2f}, guessing 0.50"


def canary_verdict(lower: float, proved: float | None) -> str:
    """Return the conclusion of a row on canaries."""
    if proved is None:
        return (
            f"no noise: every epsilon below {lower:.2f} is refuted"
            if lower > 0
            else "no conclusion: the audit did not find the canaries even without noise"
        )
    if lower > proved:
        return f"BROKEN: the canaries refute epsilon {proved:.2f}; the mechanism is not what the accountant assumes"
    return f"consistent with the proved epsilon {proved:.2f}"


def show_rows(rows: Sequence[Row], title: str) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(title=title, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="right" if head in HEADS[5:-1] else "left", overflow="fold", ratio=1 if head == HEADS[-1] else None)
    for row in rows:
        sees = row.sees + (f", batch {row.batch_size}, {row.local_steps} steps" if row.batch_size * row.local_steps > 1 else "")
        table.add_row(*_cells(row, sees))
    return table


def _cells(row: Row, sees: str) -> list[str]:
    metrics = (row.psnr_median, row.psnr_best, row.control_psnr, row.mean_image_psnr, row.class_mean_psnr)
    return [row.model, row.attack, sees, row.codec, row.prior, *map(_show, metrics), row.conclusion]


def _show(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1f}"


def write_rows(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Write ``audit.json`` (a list of rows) and ``audit.md`` (a table and how to read it), and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{key: _finite(value) for key, value in asdict(row).items()} for row in rows]
    (folder / "audit.json").write_text(json.dumps(plain, indent=2) + "\n")
    table = [f"| {' | '.join(cells)} |" for cells in (HEADS, *(_cells(row, row.sees) for row in rows))]
    table.insert(1, "|" + "---|" * len(HEADS))
    (folder / "audit.md").write_text("\n".join([f"# {title}", "", *table, "", READING]))
    return [folder / "audit.json", folder / "audit.md"]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
