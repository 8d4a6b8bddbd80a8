"""How the command line ends after a mistake: one sentence on stderr, and exit status 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

from fedlight.console.sentences import one_sentence_of
from fedlight.core.errors import own_error

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
        return one_sentence_of(str(error), _options())
    if isinstance(error, OSError) and error.errno is not None:  # disk full, folder that cannot be written, too many open files, ...
        return f"The system does not let the run go on: {error.strerror}{f' ({error.filename})' if error.filename else ''}"
    # By name: an error of Lightning's or the parser's must not make this file import them.
    if type(error).__name__ == "MisconfigurationException" or str(error).startswith(_MENDABLE):
        return one_sentence_of(str(error))
    return None


def told(error: BaseException) -> str:
    """Return any error as one sentence."""
    return str(own_error(error) or one_sentence_of(str(error)))


def _options() -> list[str]:
    """Return the options of the subcommand that is being run, one level of groups included."""
    from fedlight.console.options import all_options

    return all_options(sys.argv[1] if len(sys.argv) > 1 else "")
