"""What `--help`, `--model.codec.help` and `--model.codec.help NAME` print: options, classes to choose from, options of one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedlight.console import catalogue
from fedlight.console.help import choices_of, of_choice, of_subcommand, plain
from fedlight.console.names import did_you_mean
from fedlight.console.options import RUNS, SETTINGS, annotation_of
from fedlight.core.errors import ConfigurationError
from fedlight.subcommands import overview


def asked_for(args: Sequence[str]) -> str | None:
    """Return the help that these arguments ask for, of a subcommand, a part of a run or a class; None if they ask for none.

    None as well for a class of another package or the user's own, which the parser imports.

    Raises:
        ConfigurationError: if a name is given that is not in the list.
    """
    if args and args[0] in ("-h", "--help"):
        return overview()
    if not args or args[0] not in (*RUNS, *SETTINGS):
        return None
    for word, following in zip(args, [*args[1:], ""], strict=True):
        option, _, named = word.partition("=")
        if option in ("-h", "--help"):
            return of_subcommand(args[0])
        if found := re.fullmatch(r"--([\w.]+)\.help", option):
            return _of_part(args[0], found.group(1), named or ("" if following.startswith("-") else following))
    return None


def _of_part(subcommand: str, part: str, named: str) -> str | None:
    annotation = annotation_of(subcommand, part) or ""
    base, known = choices_of(part, annotation)
    if not base:
        return None
    if not named:
        return listed(subcommand, part, known)
    short = named.rpartition(".")[2]
    if short in known and named.startswith((short, "fedlight.", "lightning.")):
        return of_choice(subcommand, part, known[short])
    if "." not in named and base != "Module":
        raise ConfigurationError(f"{part}: there is no {named}{did_you_mean(named, known)} (`--{part}.help` lists them)")
    return None


def listed(subcommand: str, part: str, known: dict[str, catalogue.Class]) -> str:
    """Return the classes with a sentence each."""
    width = max(map(len, known))
    lines = [f"{name:{width}}  {plain(found.sentence).partition('. ')[0].rstrip('.')}" for name, found in known.items()]
    example = next(iter(known))
    return "\n".join(
        [
            f"Choices for --{part}, or a class of your own by its path (my_module.MyClass):",
            "",
            *lines,
            "",
            f"Options of one: fedlight {subcommand} --{part}.help={example}",
        ]
    )
