"""What `--help`, `--model.codec.help` and `--model.codec.help NAME` print: options, classes to choose from, options of one."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterable, Iterator, Sequence

from fedlight.console import catalogue
from fedlight.console.catalogue import Class, lightning_classes
from fedlight.console.names import did_you_mean
from fedlight.console.options import LIGHTNINGS, RUN, RUNS, SETTINGS, TRAINER, TRAINER_DEFAULTS, Option, annotation_of, own_options
from fedlight.core.errors import ConfigurationError
from fedlight.subcommands import SUBCOMMANDS, overview

_LINKED = ("data.seed", "model.seed")  # to seed_everything


def asked_for(args: Sequence[str]) -> str | None:
    """Return the help that these arguments ask for, of a subcommand, a part of a run or a class; None if they ask for none.

    None as well for a class of another package or the user's own, which the parser imports.
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


def listed(subcommand: str, part: str, known: dict[str, Class]) -> str:
    """Return the classes with a sentence each."""
    width = max(map(len, known))
    lines = [f"{name:{width}}  {plain(found.sentence).partition('. ')[0].rstrip('.')}" for name, found in known.items()]
    about = f"Choices for --{part}, or a class of your own by its path (my_module.MyClass):"
    return "\n".join([about, "", *lines, "", f"Options of one: fedlight {subcommand} --{part}.help={next(iter(known))}"])


def of_subcommand(subcommand: str) -> str:
    """Return the help of a subcommand with the options of a run, or of `compare` or `audit`."""
    parser = _parser(f"fedlight {subcommand} [--config NAME_OR_FILE] [--OPTION VALUE ...]", SUBCOMMANDS[subcommand])
    for title, options in groups(subcommand):
        _add(parser, title, options)
    return parser.format_help()


def groups(subcommand: str) -> Iterator[tuple[str, list[tuple[str, Option]]]]:
    """Yield the options of such a subcommand in groups, each with its title."""
    if subcommand in SETTINGS:
        yield "Options", [("config", RUN["config"]), *of_class(catalogue.classes()[SETTINGS[subcommand]], "")]
        return
    own = own_options(subcommand)
    plain = [(name, one) for name, one in own.items() if one.meaning and not one.annotation.startswith("@")]
    yield "Options", [*plain, ("print_config", Option("", "Print the whole configuration, defaults included, and end."))]
    for name, one in own.items():
        if one.annotation.startswith("@"):
            found = catalogue.trainer() if name == "trainer" else catalogue.classes()[one.annotation[1:]]
            yield one.meaning or found.sentence, [*of_class(found, f"{name}.")]


def of_choice(subcommand: str, part: str, found: Class) -> str:
    """Return the options of a class that may be named for a part of a run."""
    parser = _parser(f"fedlight {subcommand} --{part} {found.name} [--{part}.OPTION VALUE ...]", plain(found.sentence))
    _add(parser, "Options", of_class(found, f"{part}."))
    return parser.format_help()


def of_class(found: Class, prefix: str) -> Iterator[tuple[str, Option]]:
    """Yield the arguments of a class as options, those of its groups included."""
    line = catalogue.lineage(found)
    meanings = {name: text for one in line for name, text in _meanings(one.text).items()}
    defaults = {name: value for one in line for name, value in one.defaults.items()}
    known = catalogue.arguments(found.name) if catalogue.classes().get(found.name) is found else None
    if found is catalogue.trainer():
        meanings = {name: text.partition(". ")[0].rstrip(".") + "." for name, text in meanings.items()}
        defaults |= {name: repr(value) for name, value in TRAINER_DEFAULTS.items()}
    for name, annotation in (known if known is not None else found.own or {}).items():
        inner = catalogue.classes().get(annotation.removesuffix(" | None"))
        if prefix + name in _LINKED:
            continue
        if prefix == "trainer." and name in TRAINER:
            yield prefix + name, TRAINER[name]
            continue
        yield prefix + name, Option(annotation, meanings.get(name, ""), _default(defaults.get(name)))
        if inner is not None and {*catalogue.family(inner.name)} <= {inner.name} and inner.own:
            yield from of_class(inner, f"{prefix}{name}.")


def choices_of(part: str, annotation: str) -> tuple[str, dict[str, Class]]:
    """Return the base of the classes that may be named for a part of a run, and those by name; nothing for any other option."""
    name = part.removeprefix("trainer.")
    bases = ["Module"] if annotation == "nn.Module" else re.findall(r"\b[A-Z]\w+(?<!Module)", annotation)
    base = LIGHTNINGS.get(name) or next((one for one in bases if catalogue.family(one)), "")
    known = {**catalogue.family(base), **(lightning_classes(name) if name in LIGHTNINGS else {})}
    if part.count(".") != 1 or not base or {*known} == {base}:
        return "", {}
    return base, {one: found for one, found in sorted(known.items()) if not found.abstract and one != base}


def in_words(annotation: str) -> str:
    """Return a type in YAML's words.

    >>> in_words("Literal['equal', 'samples'] | None"), in_words("Optional[Union[list[Callback], int]]")
    ('equal or samples or null', 'list[Callback] or int or null')
    """
    text = re.sub(r"\bOptional\[(.*)\]", r"\1 | None", annotation)
    while found := re.search(r"\bUnion\[((?:[^\[\]]|\[[^\[\]]*\])*)\]", text):
        text = text.replace(found[0], " | ".join(re.split(r", (?![^\[]*\])", found[1])))
    text = re.sub(r"Literal\[(.*?)\]", lambda found: re.sub(r"[\"']", "", found[1]).replace(", ", " | "), text)
    text = re.sub(r"\b(?:nn|torch)\.|^Any$|\b_[A-Z_]+\b|(?<=Optimizer)Callable|(?<=LRScheduler)Callable", "", text)
    text = text.replace("None", "null")
    return " or ".join(part for part in text.split(" | ") if part)


def _meanings(docstring: str) -> dict[str, str]:
    """Return what a docstring says of each argument."""
    from docstring_parser import parse

    return {one.arg_name.lstrip("*"): plain(one.description or "") for one in parse(docstring).params}


def plain(text: str) -> str:
    """Return text without the markup of docstrings.

    >>> plain("See :class:`~lightning.Trainer` for ``x``. Default: ``1``. .. note:: no"), plain("`a` or b.")
    ('See Trainer for x.', 'a or b.')
    """
    text = " ".join(text.split()).partition(" .. ")[0]
    text = re.sub(r":\w+:`(?:~[\w.]*\.)?([^`]*)`|`([^`<]*) <[^>]*>`_", r"\1\2", text)
    return re.sub(r"\s*Default: \S+\.$", "", re.sub(r"`{1,2}([^`]*)`{1,2}", r"\1", text))


def _default(source: str | None) -> str:
    """Return a default in YAML's words; "" for one that is made."""
    if source is None:
        return "required"
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return ""
    words = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    return f"default: {words}"


def _parser(usage: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(usage=usage, description=description.replace("%", "%%"), add_help=False)


def _add(parser: argparse.ArgumentParser, title: str, options: Iterable[tuple[str, Option]]) -> None:
    group = parser.add_argument_group(plain(title).rstrip("."))
    for name, one in options:
        meaning = plain(one.meaning)
        kind = f"--{name}.help lists the choices" if choices_of(name, one.annotation)[1] else in_words(one.annotation)
        notes = "; ".join(part for part in (kind, one.default) if part)
        text = (meaning if one.meaning.startswith("`") else f"{meaning[:1].upper()}{meaning[1:]}") + (f" ({notes})" if notes else "")
        group.add_argument(f"--{name}", action="store_true", help=text.replace("%", "%%"))
