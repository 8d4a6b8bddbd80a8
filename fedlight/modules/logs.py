"""What a round logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fedlight.core.rounds import Round
from fedlight.metrics import cosine, relative_error
from fedlight.modules.privacy import privacy_figures

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule


def round_figures(module: FederatedModule, round: Round) -> dict[str, float]:
    """Return a round's figures by log name; `sim/` marks what a simulation sees and a real server would not."""
    assert round.aggregate is not None
    traffic = module.traffic
    figures = {"sim/loss": round.loss / max(round.trained, 1)} if module.aggregator.sim_logs else {}
    figures |= {
        "round/clients": float(round.codes.count),
        "round/absent": float(round.absent),
        "round/dropped": float(round.dropped_count),
        "round/attempts": float(round.context.attempt + 1),
        "round/aggregate_norm": float(round.aggregate[: module.layout.dim].norm()),
        "bytes/uplink_round": float(round.uplink_passes),
        "bytes/uplink": float(traffic.uplink),
        "bytes/downlink": float(traffic.downlink),
        "bytes/codec": float(traffic.codec),
        "bytes/ratio": traffic.ratio(module.layout.dim),
    }
    if module.aggregator.hides_messages:
        figures["bytes/handshake"] = float(traffic.handshake_up + traffic.handshake_down)
    return privacy_figures(module, figures)


def log_round(module: FederatedModule, figures: dict[str, float], step: int) -> None:
    """Give a round's figures to the loggers (every `trainer.log_every_n_steps` rounds) and to callbacks that watch metrics.

    Not through `LightningModule.log`: it makes a metric of every figure, which takes as long as the messages of ten clients.
    """
    trainer = module.trainer
    trainer.callback_metrics.update({name: torch.tensor(value, device=module.device) for name, value in figures.items()})
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every and (step + 1) % every == 0:
        for logger in module.loggers:
            logger.log_metrics(figures, step=step)
            logger.save()


def log_comparison(module: FederatedModule, round: Round) -> None:
    """Log how far the aggregate is from the true one, and a histogram of the mean code, in the rounds in which the simulation compares.

    Straight to the loggers: `LightningModule.log` would repeat a figure in every round until there is a new one.
    """
    if round.true is None or round.true.total is None or not module.trainer.is_global_zero:
        return
    assert round.aggregate is not None
    vectors = module.algorithm.vectors * module.layout.dim  # numbers beside them would drown them
    decoded, true = round.aggregate[:vectors], round.true.mean().to(round.aggregate)[:vectors]
    figures = {
        "sim/relative_error": float(relative_error(decoded, true)),
        "sim/cosine": float(cosine(decoded, true)),
    }
    if round.saturation:
        figures["sim/saturation"] = sum(round.saturation) / len(round.saturation)
    for logger in module.loggers:
        logger.log_metrics(figures, step=round.context.round)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram("code/mean", round.codes.mean().cpu(), round.context.round)
            if round.codes.total is not None and round.codes.total.dtype == torch.int64:
                logger.experiment.add_histogram("code/sum", round.codes.total.cpu(), round.context.round)


def log_clients(module: FederatedModule) -> None:
    """Give the clients' accuracies, one a client, to TensorBoard as a histogram."""
    accuracies = module.stage_metrics.histogram
    if not len(accuracies) or module.trainer.sanity_checking or not module.trainer.is_global_zero:
        return
    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram("val/client_accuracy", accuracies, module.trainer.global_step)
