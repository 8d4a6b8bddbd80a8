"""What a run leaves behind beside checkpoints and events: summary.json, the codec's two files, the global model."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.board import RunBoard
from fedlight.callbacks.card import card, final_metrics, settings
from fedlight.callbacks.layers import layer_figures
from fedlight.clients.auto import engine_name
from fedlight.core.export import encoder_file, save_codec
from fedlight.core.files import replacing

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
