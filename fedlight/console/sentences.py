"""The parser's and Lightning's long errors as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fedlight.console.names import did_you_mean

_FRAME = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "a dict without",
    "Unable to load config '",
)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list", "Sequence": "a list"}


def one_sentence_of(text: str, known: Iterable[str] = ()) -> str:
    """Return an error of the parser or of Lightning on one line: what is wrong where, and the nearest of the ``known`` options.

    >>> one_sentence_of("unrecognized arguments: --model.codek", ["model.codec"])
    'There is no option --model.codek; did you mean --model.codec?'
    """
    keys = re.findall(r'Parser key "([^"]+)":', text)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith((*_FRAME, "Parser key"))]
    classes = [found.group(1) for line in lines if (found := re.match(r"Problem with given class_path '([^']+)':$", line))]
    causes = [line for line in lines if not line.startswith("Problem with given class_path")]
    key = ".".join(dict.fromkeys(keys))
    if not causes:
        return f"{key}: the value cannot be what is meant" if key else " ".join(text.split())
    return _told(max(causes, key=_weight), key, classes[-1].rpartition(".")[2] if classes else "", known)


def _weight(cause: str) -> int:
    """Return how much a cause says, of the several that a value of several types has."""
    telling = ("is not accepted", "are required", "Requirement ", "No module named", "has no attribute", "dot import path", "Literal[")
    return next((len(telling) - i for i, words in enumerate(telling) if words in cause), 0)


def _told(cause: str, key: str, kind: str, known: Iterable[str]) -> str:
    at = f"{key}: " if key else ""
    if found := re.match(r"(?:Subcommand '\w+' does not accept option|Option) '([^']+)'", cause):
        name = found.group(1)
        return f"{at}{kind} has no argument {name}" if kind else f"There is no option {name}{did_you_mean(name, known)}"
    if found := re.match(r"unrecognized arguments: (\S+)", cause):
        name = found.group(1).partition("=")[0]
        return f"There is no option {name}{did_you_mean(name, [f'--{one}' for one in known])}"
    if found := re.match(r"the following arguments are required: (.+)", cause):
        needed = re.sub(r"^\w+\.(?=model|data)", "", found.group(1))
        return (
            f"{at}{kind} needs {needed}"
            if kind
            else f"Expected {needed} but got none: name it, or start from a shipped configuration, "
            + ("as in `fedlight fit --config digits`")
        )
    if found := re.match(r"argument (\S+): expected one argument", cause):
        return f"Expected a value after {found.group(1)} but got none"
    if found := re.search(r"Expected a dot import path string: (\S+)", cause):
        return f"{at}there is no class {found.group(1)}; one of your own needs its module, as in my_module.{found.group(1)}"
    if found := re.search(r"Expected a <class '(?:[\w.]*\.)?(\w+)'>\. Got value: (.*)", cause):
        wanted, value = found.groups()
        return f"Expected {key} to be {_KINDS.get(wanted, wanted)} but got {value}"
    if found := re.match(r"Expected a <class '(\w+)'>$", cause):
        return f"Expected {key} to be {_KINDS.get(found.group(1), found.group(1))}"
    if found := re.search(r"Expected a typing\.Literal\[(.*?)\](?:\. Got value: (.*))?$", cause):
        choices, value = found.group(1).replace("'", ""), found.group(2)
        return f"Expected {key} to be one of {choices}" + (f" but got {value}{did_you_mean(value, choices.split(', '))}" if value else "")
    if found := re.search(r"on metric `([^`]+)` which is not available.*following: `(.*)`", cause):
        return _no_metric("EarlyStopping", found.group(1), found.group(2).split("`, `"))
    if found := re.search(
        r"`ModelCheckpoint\(monitor='([^']+)'\)` could not find the monitored key in the returned metrics: (\[.*?\])", cause
    ):
        return _no_metric("ModelCheckpoint", found.group(1), re.findall(r"'([^']+)'", found.group(2)))
    return at + " ".join(cause.split())


def _no_metric(who: str, name: str, known: list[str]) -> str:
    return f"Expected `monitor` of {who} to be a metric of the run but got {name}{did_you_mean(name, known)} (there are {', '.join(known)})"
