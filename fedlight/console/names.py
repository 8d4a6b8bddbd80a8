"""The nearest name to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is nearest to ``name``, regardless of case, or None if none is near.

    >>> nearest("TransfromCodec", ["TransformCodec", "LinearCodec"]), nearest("xyz", ["TransformCodec"])
    ('TransformCodec', None)
    """
    by_lower = {one.lower(): one for one in known}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name nearest to ``name``, or nothing if none is near."""
    found = nearest(name, known)
    return f"; did you mean {found}?" if found else ""
