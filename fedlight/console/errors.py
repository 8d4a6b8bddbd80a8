"""How the command line ends after a mistake: one sentence on stderr, of the parser's and Lightning's long errors too, and exit status 2."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fedlight.console.names import did_you_mean
from fedlight.core.errors import own_error

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
_MENDABLE = ("Early stopping conditioned", "Does not validate", "Error(s) in loading state_dict for")


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with a sentence and status 2 where the block raises an error that a user can mend; others pass."""
    before = threading.excepthook
    # Such as TensorBoard's on a full disk: whoever hands it more to write is told as well.
    threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else before(failed)
    try:
        yield
    except BrokenPipeError as error:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from error
    except Exception as error:
        text = mendable(error)
        if text is None:
            raise
        logging.getLogger(__name__).debug("details", exc_info=True)
        print(f"fedlight: error: {text}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        threading.excepthook = before


def mendable(error: BaseException) -> str | None:
    """Return the sentence of an error that comes of a mistake in options, data, files or devices, or None for any other."""
    own = own_error(error)
    if own is not None:
        return str(own)
    if isinstance(error, ArgumentError):
        from fedlight.console.options import all_options

        return one_sentence_of(str(error), all_options(sys.argv[1] if len(sys.argv) > 1 else ""))
    if isinstance(error, OSError) and error.errno is not None:  # disk full, folder that cannot be written, too many open files, ...
        return f"The system does not let the run go on: {error.strerror}{f' ({error.filename})' if error.filename else ''}"
    # By name: an error of Lightning's or the parser's must not make this file import them.
    if type(error).__name__ == "MisconfigurationException" or str(error).startswith(_MENDABLE):
        return one_sentence_of(str(error))
    return None


def told(error: BaseException) -> str:
    """Return any error as one sentence."""
    return str(own_error(error) or one_sentence_of(str(error)))


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
