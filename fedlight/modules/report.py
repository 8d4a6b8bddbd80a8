"""The table that ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlight.metrics import format_bytes


def show_runs(runs: list[tuple[str, tuple[dict[str, Any], str | None]]], console: Console) -> None:
    """Print accuracies, bytes and seconds of (name, (summary, folder)) runs side by side, and where to look next."""
    table = Table("", *(name for name, _ in runs), title="Federated run")
    summaries = [summary for _, (summary, _) in runs]
    summaries = [{**one, "total_bytes": one["uplink_bytes"] + one["downlink_bytes"]} if "uplink_bytes" in one else one for one in summaries]
    for title, key, show in _ROWS:
        if any(key in summary for summary in summaries):
            table.add_row(title, *(show(summary[key]) if key in summary else "" for summary in summaries))
    console.print(table)
    for name, (_, folder) in runs:
        if folder:
            console.print(f"{name}: {folder}", soft_wrap=True)
    roots = {str(Path(folder).parents[1]) for _, (_, folder) in runs if folder}
    for root in sorted(roots):
        console.print(f"Curves: [bold]tensorboard --logdir {root}[/bold]", soft_wrap=True)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("test accuracy", "test_accuracy", _percent),
    ("validation accuracy", "val_accuracy", _percent),
    ("epsilon", "epsilon_unamplified", "{:.3f}".format),
    ("epsilon if cohorts stay secret", "epsilon", "{:.3f}".format),
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
