"""The command `fedlight`: its help is instant, because only a subcommand imports torch and Lightning, which takes seconds."""

from __future__ import annotations

import argparse
import signal
import sys

from fedlight.subcommands import DESCRIPTION, SUBCOMMANDS


def overview() -> str:
    """Return the text of `fedlight --help`."""
    parser = argparse.ArgumentParser("fedlight", description=DESCRIPTION, epilog="For the options of a subcommand: fedlight fit --help.")
    commands = parser.add_subparsers(title="subcommands", metavar="<subcommand>")
    for name, what in SUBCOMMANDS.items():
        commands.add_parser(name, help=what)
    return parser.format_help()


def main() -> None:
    """Print the overview for a bare `--help`, else run the command line."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(overview(), end="")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        from fedlight.cli import main as run

        run()
    except KeyboardInterrupt:  # while it imports
        sys.exit(128 + signal.SIGINT)
