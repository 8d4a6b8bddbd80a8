"""What a run leaves behind beside checkpoints and events: summary.json, the codec's two files, the global model, a card in words."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.board import RunBoard
from fedlight.clients.auto import Auto, engine_name
from fedlight.codecs.matrices import Matrices
from fedlight.codecs.selection import Selection, split_grids
from fedlight.core.codec import Codec
from fedlight.core.export import encoder_file, save_codec
from fedlight.core.figures import format_bytes
from fedlight.core.files import replacing
from fedlight.core.layout import Layout
from fedlight.core.metric_names import RESULTS, shown

SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.csv"  # Lightning's CSVLogger writes it
LAYERS_FILE = "layers.json"
MODEL_FILE = "model.safetensors"


class RunSummary(Callback):
    """Writes `summary.json`, `encoder.safetensors`, `decoder.safetensors` and `model.safetensors` to the run's folder.

    Attributes:
        summary: the figures of the run so far.
    """

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export codec and model, and write the summary."""
        module = cast("FederatedRun", pl_module)
        folder = trainer.log_dir
        if folder is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        save_codec(module.codec, Path(folder))
        with replacing(Path(folder) / MODEL_FILE) as file:
            file.write(save({name: value.cpu().contiguous().clone() for name, value in module.network.state_dict().items()}))
        self._write(trainer, module, Path(folder))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the test figures, and give them to the HParams tab."""
        folder = trainer.log_dir
        if folder is None or not trainer.is_global_zero:
            return
        module = cast("FederatedRun", pl_module)
        self._write(trainer, module, Path(folder))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings(module), final_metrics(self.summary), step=self.summary["rounds"])
            if isinstance(logger, RunBoard):
                logger.log_text("run", card(module, self.summary, logger.steady(), folder))

    def _write(self, trainer: Trainer, module: FederatedRun, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.summary |= summarize(trainer, module)
        with replacing(folder / SUMMARY_FILE) as file:
            file.write((json.dumps(self.summary, indent=2) + "\n").encode())
        for board in (logger for logger in trainer.loggers if isinstance(logger, RunBoard)):
            figures = layer_figures(module.codec, module.layout, board.energy_kept)
            with replacing(folder / LAYERS_FILE) as file:
                file.write((json.dumps(figures, indent=2) + "\n").encode())


def summarize(trainer: Trainer, module: FederatedRun) -> dict[str, Any]:
    """Return the figures of a run: accuracies, rounds, exact bytes, ratio, seconds and versions."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(("val", "test"))}
    traffic = module.server_state.traffic
    handshakes = {
        "handshake_uplink_bytes": traffic.handshake_up,
        "handshake_downlink_bytes": traffic.handshake_down,
        "uplink_ratio_with_handshakes": 4 * module.layout.dim * traffic.messages / traffic.uplink if traffic.uplink else 0.0,
    }
    return (
        {name.replace("/", "_"): value for name, value in metrics.items()}
        | (handshakes if module.aggregator.hides_messages else {})
        | {
            "rounds": module.server_state.rounds,
            "clients": module.data.num_population,
            "seed": module.seed,
            "engine": engine_name(module.engine),
            "threads": torch.get_num_threads(),
            "parameters": module.layout.dim,
            "uplink_bytes_per_client": traffic.mean_message,
            "uplink_bytes": traffic.uplink,
            "downlink_bytes": traffic.downlink,
            "total_bytes": traffic.uplink + traffic.downlink,
            "codec_bytes": traffic.codec,
            "encoder_bytes": len(encoder_file(module.codec)) if module.codec.version else 0,
            "uplink_ratio": traffic.ratio(module.layout.dim),
            "additive": module.codec.additive,
            "train_seconds": module.seconds_trained(),
            "pretrain_seconds": module.pretrain_seconds,
            **{f"{name}_bytes": int(value) for name, value in (module.clients.figures() if module.clients else {}).items()},
            **(module.privacy.report() if module.privacy else {}),
            "versions": {name: version(name) for name in ("fedlight", "lightning", "torch")},
        }
    )


def bits_by_layer(codec: Codec) -> dict[str, int]:
    """Return the bits of one message by weight tensor (a bias counts with its weight); empty for codecs that do not share them out."""
    inner: Codec = getattr(codec, "codec", codec)  # of an algorithm that sends more than the update
    part: Codec = next(iter(getattr(inner, "codecs", ())), inner)  # of a chain the first sees the model
    plan, layout = getattr(part, "plan", None) or {}, part.layout
    if layout is None or not {"grids", "bits"} <= {*plan}:
        return {}
    selection = Selection.from_plan(plan)
    grids = split_grids(selection.bits, selection.grids)
    items = Matrices.of(layout).items
    return {layout.names[item.tensors[0]]: int(bits.sum()) for item, bits in zip(items, grids, strict=True)}


def layer_figures(codec: Codec, layout: Layout, energy: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return, by parameter, its numbers, the share of the true update's energy that was kept (`energy_kept`) and the bits spent on it."""
    bits = bits_by_layer(codec)
    told: dict[str, dict[str, float]] = {}
    for name, length in zip(layout.names, layout.sizes, strict=True):
        told[name] = {"numbers": length} | ({"energy_kept": energy[name]} if name in energy else {})
        told[name] |= {"bits": bits[name]} if name in bits else {}
    return told


def card(module: FederatedRun, summary: dict[str, Any], steady: dict[str, float], folder: str | None) -> str:
    """Return a run's card as Markdown, from its module, its summary, the metrics that never changed and its folder."""
    setting = {name: str(value) for name, value in settings(module).items()} | {
        "engine": summary["engine"],
        "threads": str(summary["threads"]),
        "rounds": str(summary["rounds"]),
        "parameters": f"{summary['parameters']:,}",
    }
    parts = [
        _table("Result", _result(summary)),
        _table("Bytes", _bytes(summary)),
        _table("Privacy", _privacy(summary)),
        _table("Setting", setting),
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
