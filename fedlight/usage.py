"""The command `fedlight`: its help comes at once, because torch and Lightning, which take seconds to import, wait for a subcommand."""

from __future__ import annotations

import argparse
import sys

from fedlight.subcommands import DESCRIPTION, SUBCOMMANDS


def overview() -> str:
    """Return what `fedlight --help` prints."""
    parser = argparse.ArgumentParser("fedlight", description=DESCRIPTION, epilog="For the options of a subcommand: fedlight fit --help.")
    commands = parser.add_subparsers(title="subcommands", metavar="<subcommand>")
    for name, what in SUBCOMMANDS.items():
        commands.add_parser(name, help=what)
    return parser.format_help()


def main() -> None:
    """Print the overview if that is all that is asked for, else run the command line."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(overview(), end="")
        return
    from fedlight.cli import main as run

    run()
