"""Short names of runs, after what makes them differ: `transform-35x`, `fedprox-no-codec`."""

from __future__ import annotations

import re
from typing import Any

from fedlight.core.codec import Codec


def codec_label(codec: Codec) -> str:
    """Return a codec's short name: its kind, with its ratio, rank or bits; `no-codec` where updates are sent whole."""
    inner: Codec = getattr(codec, "codec", codec)  # of an algorithm that sends more than the update
    parts = getattr(inner, "codecs", None)
    if parts:
        return "-".join(codec_label(part) for part in parts)
    kind = _kind(inner, "Codec")
    if kind == "identity":
        return "no-codec"
    for name, unit in (("ratio", "x"), ("rank", "rank"), ("bits", "bit")):
        value = getattr(inner, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f"{kind}-{value:g}{unit}" if unit != "rank" else f"{kind}-rank{value:g}"
    return kind


def run_label(module: Any) -> str:
    """Return a run's short name: its codec, and what else is not the default."""
    words = [codec_label(module.codec)]
    if (algorithm := _kind(module.algorithm, "")) not in ("fedavg", "clientoptimizer"):
        words.insert(0, algorithm)
    if (aggregator := _kind(module.aggregator, "Aggregator")) != "plain":
        words.append(aggregator)
    if module.privacy is not None:
        words.append(_kind(module.privacy, ""))
    return "-".join(words)


def _kind(part: object, suffix: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", type(part).__name__.removesuffix(suffix).lower()).strip("-") or "own"
