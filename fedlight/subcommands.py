"""The subcommands of `fedlight`, in words."""

from __future__ import annotations

import argparse

DESCRIPTION = (
    "Federated learning with learned codes: clients send short codes of their updates, the server decodes only their sum. "
    "Start with `fedlight fit --config digits`; the number of rounds is --trainer.max_steps."
)

SUBCOMMANDS = {
    "fit": "Train: pretrain the codec on proxy data, run the rounds, test the final model.",
    "validate": "Evaluate the model of a checkpoint on the validation data.",
    "test": "Evaluate the model of a checkpoint on the test set.",
    "predict": "Write the labels that the model of a checkpoint gives the test set.",
    "pretrain": "Train the codec on proxy data, report its error on held-out updates, and write encoder and decoder.",
    "compare": "Run codecs over seeds on one data set and model, and write accuracy against bytes as table, files and pictures.",
    "flower": "Deploy on a network: write the files of a deployment, or run a demonstration (needs the extra `flower`).",
    "node": "Run one client of a deployed federation until it is stopped.",
    "audit": "Attack what clients send and report what comes back, beside the same attacks on plain updates and blind guesses.",
    "report": "Write runs beside each other into one HTML file: accuracy, bytes, clients, privacy, codec.",
    "configs": "List the configurations that ship with fedlight, or copy some to edit them.",
    "completion": "Write a script that completes subcommands, options and names in bash or zsh.",
    "doctor": "Show versions, extras, threads, data and devices, what is missing and the command that adds it.",
}

_EPILOG = "For the options of a subcommand: fedlight fit --help."


def overview() -> str:
    """Return the text of `fedlight --help`."""
    parser = argparse.ArgumentParser("fedlight", description=DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(title="subcommands", metavar="<subcommand>")
    for name, what in SUBCOMMANDS.items():
        commands.add_parser(name, help=what)
    return parser.format_help()
