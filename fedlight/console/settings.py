"""Subcommands whose options are those of one class, in a YAML file or one by one."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from fedlight.console.errors import told
from fedlight.core.errors import ConfigurationError
from fedlight.subcommands import SUBCOMMANDS


def settings_parser(command: str, settings: type) -> ArgumentParser:
    """Return the parser of a subcommand with the options of a class."""
    parser = ArgumentParser(prog=f"fedlight {command}", description=SUBCOMMANDS[command], exit_on_error=False)
    about = f"Path to a YAML file with these options, or the name of a shipped one, such as {command}_digits."
    parser.add_argument("-c", "--config", action="config", help=about)
    parser.add_class_arguments(settings, None, fail_untyped=False)
    return parser


def read_settings(command: str, parser: ArgumentParser, args: list[str]) -> tuple[Namespace, Path | None]:
    """Return what arguments and file say, and the file if there is one; raises ``ConfigurationError`` for a mistake."""
    try:
        given: Namespace = parser.parse_args(args)
    except Exception as error:
        raise ConfigurationError(f"{command}: {told(error)} (options: fedlight {command} --help)") from error
    files = given.pop("config", None) or []
    return given, Path(files[-1].absolute) if files and files[-1] else None
