"""The card of a run: what was run, what it cost and how to repeat it, in words for TensorBoard's Text tab."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.label import codec_label
from fedlight.clients.auto import Auto
from fedlight.core.figures import format_bytes
from fedlight.core.metric_names import RESULTS, shown


def card(module: FederatedRun, summary: dict[str, Any], steady: dict[str, float], folder: str | None) -> str:
    """Return a run's card as Markdown, from its module, its summary, the metrics that never changed and its folder."""
    parts = [
        _table("Result", _result(summary)),
        _table("Bytes", _bytes(summary)),
        _table("Privacy", _privacy(summary)),
        _table("Setting", _setting(module, summary)),
        _table("Unchanged in every round", {shown(name).tag: f"{value:g}" for name, value in sorted(steady.items())}),
        f"**Codec**\n\n```json\n{json.dumps(module.codec.config(), indent=2)}\n```",
    ]
    if folder and (Path(folder) / "config.yaml").is_file():
        named = f"--threads {summary['threads']}" + (f" --model.engine {summary['engine']}" if isinstance(module.engine, Auto) else "")
        parts.append(f"**Repeat it**\n\n```\nfedlight fit --config {shlex.quote(str(Path(folder) / 'config.yaml'))} {named}\n```")
    return "\n\n".join(part for part in parts if part)


def final_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Return the figures of the HParams tab, those that the run has."""
    seconds = summary["train_seconds"] + summary["pretrain_seconds"]
    worst = summary.get("test_client_accuracy_worst", summary.get("val_client_accuracy_worst"))
    values = (summary.get("test_accuracy"), worst, summary["total_bytes"] / 1e6, summary["uplink_ratio"], seconds)
    return {name: float(value) for name, value in zip(RESULTS, values, strict=True) if value is not None}


def settings(module: FederatedRun) -> dict[str, Any]:
    """Return the run's settings as one level of names, for the HParams tab; `codec` tells a codec from the baseline."""
    numbers = {f"local/{name}": value for name, value in vars(module.algorithm).items() if isinstance(value, (int, float))}
    return {
        "codec": codec_label(module.codec),
        "network": type(module.network).__name__,
        "algorithm": type(module.algorithm).__name__,
        "aggregator": type(module.aggregator).__name__,
        "downlink": type(module.downlink).__name__,
        "privacy": type(module.privacy).__name__ if module.privacy else "none",
        "weighting": module.weighting,
        "seed": module.seed,
        "clients": module.data.num_population,
        "partitioner": type(module.data.partitioner).__name__,
        "source": module.data.source.name,
    } | numbers


def _setting(module: FederatedRun, summary: dict[str, Any]) -> dict[str, str]:
    named = settings(module)
    return {name: str(value) for name, value in named.items()} | {
        "engine": summary["engine"],
        "threads": str(summary["threads"]),
        "rounds": str(summary["rounds"]),
        "parameters": f"{summary['parameters']:,}",
    }


def _result(summary: dict[str, Any]) -> dict[str, str]:
    accuracies = {name.replace("_", " "): f"{100 * value:.2f} %" for name, value in summary.items() if name.endswith("accuracy")}
    return accuracies | {"training": f"{summary['train_seconds']:.1f} s", "pretraining": f"{summary['pretrain_seconds']:.1f} s"}


def _bytes(summary: dict[str, Any]) -> dict[str, str]:
    up, down = summary["uplink_bytes"], summary["downlink_bytes"]
    return {
        "message of a client": format_bytes(summary["uplink_bytes_per_client"]),
        "uplink ratio": f"{summary['uplink_ratio']:.1f}x",
        "uplink": format_bytes(up),
        "downlink": format_bytes(down),
        "of which encoders": format_bytes(summary["codec_bytes"]),
        "both ways": format_bytes(up + down),
    }


def _privacy(summary: dict[str, Any]) -> dict[str, str]:
    names = ("epsilon", "epsilon_if_cohorts_secret", "delta", "noise_multiplier", "clip")
    return {name.replace("_", " "): f"{summary[name]:.4g}" for name in names if isinstance(summary.get(name), (int, float))}


def _table(title: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    return f"| {title} | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
