"""How the command line ends after a mistake: one sentence on stderr, and exit status 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedlight.core.errors import own_error


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with the error's sentence and status 2 where the block raises one of fedlight's errors."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        logging.getLogger(__name__).debug("details", exc_info=True)
        print(f"fedlight: error: {own}", file=sys.stderr)
        raise SystemExit(2) from error
