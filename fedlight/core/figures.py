"""The figures of a run's summary as people read them: rows of the table that ends a run, and of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = tuple[str, str, Callable[[Any], str]]
"""Title, key of `summary.json` and how the figure is shown."""


def format_bytes(n_bytes: float) -> str:
    """Return a number of bytes in decimal units, with three digits.

    >>> format_bytes(512), format_bytes(1_500), format_bytes(12_340_000), format_bytes(7e14)
    ('512 B', '1.50 kB', '12.3 MB', '700 TB')
    """
    if n_bytes < 999.5:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        n_bytes /= 1000
        if n_bytes < 999.5 or unit == "PB":
            break
    decimals = 2 if n_bytes < 9.995 else 1 if n_bytes < 99.95 else 0
    return f"{n_bytes:.{decimals}f} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"


ROWS: tuple[Row, ...] = (
    ("test accuracy", "test_accuracy", _percent),
    ("validation accuracy", "val_accuracy", _percent),
    ("epsilon", "epsilon", "{:.3f}".format),
    ("epsilon if cohorts stay secret", "epsilon_if_cohorts_secret", "{:.3f}".format),
    ("delta", "delta", str),
    ("noise multiplier", "noise_multiplier", "{:.4g}".format),
    ("rounds", "rounds", str),
    ("uplink per client and round", "uplink_bytes_per_client", format_bytes),
    ("uplink ratio", "uplink_ratio", "{:.1f}x".format),
    ("total uplink", "uplink_bytes", format_bytes),
    ("total downlink", "downlink_bytes", format_bytes),
    ("of which encoders", "codec_bytes", format_bytes),
    ("total, both ways", "total_bytes", format_bytes),
    ("keys and shares, up", "handshake_uplink_bytes", format_bytes),
    ("keys and shares, down", "handshake_downlink_bytes", format_bytes),
    ("carried by Flower, up", "engine_uplink_bytes", format_bytes),
    ("carried by Flower, down", "engine_downlink_bytes", format_bytes),
    ("pretraining", "pretrain_seconds", _seconds),
    ("training", "train_seconds", _seconds),
)
"""The rows of the table, in its order."""


def rows(summaries: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of runs with these summaries: what a LightningModule logs of its tests leads where there is no accuracy of ours."""
    keys = dict.fromkeys(key for summary in summaries for key in summary)
    ours = {"test_accuracy", "val_accuracy"} & set(keys)
    own = [] if ours else [(key, key, "{:.4g}".format) for key in sorted(keys) if key.startswith(("test", "val"))]
    return [*own, *(row for row in ROWS if row[1] in keys)]
