"""What a run should know of, told as one plain sentence."""

from __future__ import annotations

import warnings

from lightning.pytorch.utilities import rank_zero_warn


def tell(sentence: str) -> None:
    """Warn of this on the first process: a ``UserWarning`` that is shown without the file and the line that it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        rank_zero_warn(sentence, stacklevel=5)
    finally:
        warnings.formatwarning = before
