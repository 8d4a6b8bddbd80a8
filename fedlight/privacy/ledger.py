"""All releases so far: the list behind epsilon, stored in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlight.core.errors import ConfigurationError
from fedlight.core.files import append_synced, replacing
from fedlight.privacy.accounting import Releases, epsilon

JOURNAL = "privacy_ledger.txt"
log = logging.getLogger(__name__)


class Ledger:
    """Counts releases of noisy sums; consecutive equal ones share a line.

    Law: it contains every published sum, including those that the server discarded afterwards.

    Attributes:
        lines: [noise multiplier, sampling rate, number of releases].
        journal: a file that has a line for every release before its sum is opened, if there is one: a run that is killed, or goes on
            from a checkpoint, has released more than the checkpoint knows.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[float, float, int]] = []
        self.journal: Path | None = None

    def __len__(self) -> int:
        return sum(times for _, _, times in self.lines)

    def add(self, multiplier: float, rate: float) -> None:
        """Record one release, in the journal first."""
        if self.journal is not None:
            append_synced(self.journal, f"{multiplier!r} {rate!r}\n")
        self.lines = list(self.after(multiplier, rate))

    def after(self, multiplier: float, rate: float) -> Releases:
        """Return the lines after one more release."""
        if self.lines and self.lines[-1][:2] == (multiplier, rate):
            return (*self.lines[:-1], (multiplier, rate, self.lines[-1][2] + 1))
        return (*self.lines, (multiplier, rate, 1))

    def find_journal(self, path: Path) -> None:
        """Look for the journal at ``path`` if it is not where the checkpoint says, as in a folder that was moved."""
        if self.journal is not None and not self.journal.is_file():
            self.journal = path

    def keep_journal(self, path: Path) -> None:
        """Keep a journal from now on: that of the checkpoint, whose releases are taken over, or else a new one at ``path``.

        Raises:
            ConfigurationError: if the journal holds something else, or less than the checkpoint knows.
        """
        earlier = self.journal
        if earlier is not None and not earlier.is_file():
            log.warning("There is no %s any more: what was released after the checkpoint is not counted", earlier)
            earlier = None
        if earlier is not None:
            path, known = earlier, len(self)
            self.lines = _read(earlier)
            if len(self) < known:
                raise ConfigurationError(
                    f"Expected {earlier} to hold the {known} releases that the checkpoint knows but it holds {len(self)}: restore the file"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        if earlier is None or earlier.read_bytes()[-1:] not in (b"", b"\n"):  # new, or its last line was cut off
            with replacing(path) as file:
                file.write("".join(f"{multiplier!r} {rate!r}\n" * times for multiplier, rate, times in self.lines).encode())
        self.journal = path

    def epsilon(self, accountant: str, delta: float, amplified: bool = True) -> float:
        """Return the epsilon of the releases; without amplification everybody counts as taking part in all of them."""
        return epsilon(accountant, tuple(self.lines) if amplified else unamplified(self.lines), delta)

    def state_dict(self) -> dict[str, Any]:
        """Return the lines, and where the journal is, as plain data."""
        return {"lines": [list(line) for line in self.lines], "journal": str(self.journal) if self.journal else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the lines from ``state_dict``."""
        self.lines = [(float(multiplier), float(rate), int(times)) for multiplier, rate, times in state["lines"]]
        self.journal = Path(state["journal"]) if state.get("journal") else None


def _read(path: Path) -> list[tuple[float, float, int]]:
    """Return the lines of a journal; the last one, if a crash cut it off, was not released."""
    ledger = Ledger()
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            multiplier, rate = map(float, line.split())
        except ValueError as error:
            raise ConfigurationError(f"Expected a noise multiplier and a rate in every line of {path} but got {line!r}") from error
        ledger.add(multiplier, rate)
    return ledger.lines


def unamplified(lines: list[tuple[float, float, int]]) -> Releases:
    """Return the same releases at sampling rate 1, as one line: Gaussian sums compose to one whose multipliers' inverse squares add up."""
    equal = {multiplier for multiplier, _, _ in lines}
    if len(equal) == 1:
        return ((equal.pop(), 1.0, sum(times for _, _, times in lines)),)
    return tuple((multiplier, 1.0, times) for multiplier, _, times in lines)
