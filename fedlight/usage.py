"""The command `fedlight`: help and what needs no training answer at once, because only a run imports torch and Lightning."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

from fedlight.subcommands import overview


def main() -> None:
    """Answer what needs no run, else check the arguments and run the command line."""
    args = sys.argv[1:]
    if not args or args in (["-h"], ["--help"]):
        print(overview(), end="")
    elif args == ["--version"]:
        from importlib.metadata import version

        print(f"fedlight {version('fedlight')}")
    else:
        _run(args)


def _run(args: list[str]) -> None:
    # Classes of the user's own are found in the current folder, as `python -m fedlight` finds them.
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    from fedlight.console.errors import one_sentence

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with one_sentence():
            _command(args)
    except KeyboardInterrupt:  # while it imports
        sys.exit(128 + signal.SIGINT)


def _command(args: list[str]) -> None:
    homes = {name: f"fedlight.console.{name}" for name in ("configs", "completion", "doctor")} | {"report": "fedlight.report.command"}
    if args[0] in homes:
        return import_module(homes[args[0]]).command(args[1:])  # type: ignore[no-any-return]
    if args[0] in ("node", "flower"):
        from fedlight.flower.commands import main as deploy  # without Lightning

        raise SystemExit(deploy(args))
    from fedlight.console.values import prepare

    sys.argv[1:] = prepare(args)
    from fedlight.cli import main as run

    run()
