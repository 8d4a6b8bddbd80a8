"""All releases so far: the list behind epsilon, stored in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlight.privacy.accounting import Releases, epsilon


class Ledger:
    """Counts releases of noisy sums; consecutive equal ones share a line.

    Law: it contains every published sum, including those that the server discarded afterwards.

    Attributes:
        lines: [noise multiplier, sampling rate, number of releases].
    """

    def __init__(self) -> None:
        self.lines: list[tuple[float, float, int]] = []

    def __len__(self) -> int:
        return sum(times for _, _, times in self.lines)

    def add(self, multiplier: float, rate: float) -> None:
        """Record one release."""
        self.lines = list(self.after(multiplier, rate))

    def after(self, multiplier: float, rate: float) -> Releases:
        """Return the lines after one more release."""
        if self.lines and self.lines[-1][:2] == (multiplier, rate):
            return (*self.lines[:-1], (multiplier, rate, self.lines[-1][2] + 1))
        return (*self.lines, (multiplier, rate, 1))

    def epsilon(self, accountant: str, delta: float, amplified: bool = True) -> float:
        """Return the epsilon of the releases; without amplification everybody counts as taking part in all of them."""
        return epsilon(accountant, tuple(self.lines) if amplified else unamplified(self.lines), delta)

    def state_dict(self) -> dict[str, Any]:
        """Return the lines as plain data."""
        return {"lines": [list(line) for line in self.lines]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the lines from ``state_dict``."""
        self.lines = [(float(multiplier), float(rate), int(times)) for multiplier, rate, times in state["lines"]]


def unamplified(lines: list[tuple[float, float, int]]) -> Releases:
    """Return the same releases at sampling rate 1, as one line: Gaussian sums compose to one whose multipliers' inverse squares add up."""
    equal = {multiplier for multiplier, _, _ in lines}
    if len(equal) == 1:
        return ((equal.pop(), 1.0, sum(times for _, _, times in lines)),)
    return tuple((multiplier, 1.0, times) for multiplier, _, times in lines)
