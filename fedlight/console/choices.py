"""`fedlight fit --model.codec.help`: the classes to choose from, a line each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedlight.console import catalogue
from fedlight.console.check import annotation_of
from fedlight.console.names import did_you_mean
from fedlight.core.errors import ConfigurationError


def asked_for(args: Sequence[str]) -> str | None:
    """Return the list that these arguments ask for with an option `--<part>.help` without a name; None if they ask for none.

    Raises:
        ConfigurationError: if a name is given that is not in the list.
    """
    if not args:
        return None
    for word, following in zip(args, [*args[1:], ""], strict=True):
        option, _, named = word.partition("=")
        found = re.fullmatch(r"--([\w.]+)\.help", option)
        if found is None:
            continue
        part, named = found.group(1), named or ("" if following.startswith("-") else following)
        annotation = annotation_of(args[0], part)
        bases = [one for one in re.findall(r"\b[A-Z]\w+", annotation or "") if catalogue.family(one)]
        if annotation == "nn.Module":
            bases = ["Module"]
        if not bases or set(catalogue.family(bases[0])) == {bases[0]}:
            return None
        known = catalogue.family(bases[0])
        if not named:
            return listed(args[0], part, known)
        if "." not in named and named not in known:
            raise ConfigurationError(f"{part}: there is no {named}{did_you_mean(named, known)} (`--{part}.help` lists them)")
        return None
    return None


def listed(subcommand: str, part: str, known: dict[str, catalogue.Class]) -> str:
    """Return the classes with a sentence each."""
    width = max(map(len, known))
    lines = [f"{name:{width}}  {_plain(found.sentence)}" for name, found in known.items()]
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


def _plain(sentence: str) -> str:
    return re.sub(r"`{1,2}([^`]*)`{1,2}", r"\1", sentence)
