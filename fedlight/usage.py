"""The command `fedlight`: its help is instant, because only a subcommand imports torch and Lightning, which takes seconds."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = (
    "Federated learning with learned codes: clients send short codes of their updates, the server decodes only their sum. "
    "Start with `fedlight fit --config configs/digits.yaml`; the number of rounds is --trainer.max_steps."
)

SUBCOMMANDS = {
    "fit": "Train: pretrain the codec on proxy data, run the rounds, test the final model.",
    "validate": "Evaluate the model of a checkpoint on the validation data.",
    "test": "Evaluate the model of a checkpoint on the test set.",
    "predict": "Write the labels that the model of a checkpoint predicts for the test set.",
    "pretrain": "Train the codec on proxy data, report its error on held-out updates, and write encoder and decoder.",
    "compare": "Run codecs over seeds on one data set and model, and write accuracy against bytes as a table, files and pictures.",
    "audit": "Attack what clients send and report what the attacks recover, next to the same attacks on plain updates and blind guesses.",
}


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
    from fedlight.cli import main as run

    run()
