"""What happens to arguments before anything is imported: help that they ask for, checks, names of configurations."""

from __future__ import annotations

from collections.abc import Sequence

from fedlight.console.check import check
from fedlight.console.configs import with_files
from fedlight.console.help import asked_for
from fedlight.console.values import try_values


def prepare(args: Sequence[str]) -> list[str]:
    """Return checked arguments with files for names of configurations, or print the help that they ask for and end."""
    listed = asked_for(args)
    if listed is not None:
        print(listed, flush=True)
        raise SystemExit(0)
    check(args)
    try_values(args)
    return with_files(args)
