"""The table that ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlight.core.figures import rows


def show_runs(runs: list[tuple[str, tuple[dict[str, Any], str | None]]], console: Console) -> None:
    """Print accuracies, bytes and seconds of (name, (summary, folder)) runs side by side, and where to look next."""
    table = Table("", *(name for name, _ in runs), title="Federated run")
    summaries = [summary for _, (summary, _) in runs]
    for title, key, show in rows(summaries):
        table.add_row(title, *(show(summary[key]) if key in summary else "" for summary in summaries))
    console.print(table)
    for name, (_, folder) in runs:
        if folder:
            console.print(f"{name}: {folder}", soft_wrap=True)
    folders = [Path(folder) for _, (_, folder) in runs if folder]
    roots = {str(folder.parents[1]) for folder in folders if any(folder.glob("events.out.tfevents*"))}  # of TensorBoard's logger
    for root in sorted(roots):
        console.print(f"Curves: [bold]tensorboard --logdir {root}[/bold]", soft_wrap=True)
