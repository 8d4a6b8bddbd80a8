"""What a round logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fedlight.core.rounds import Round
from fedlight.metrics import cosine, relative_error

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule


def round_figures(module: FederatedModule, round: Round) -> dict[str, float]:
    """Return a round's figures by log name; `sim/` marks what a simulation sees and a real server would not."""
    assert round.aggregate is not None
    traffic = module.traffic
    figures = {
        "sim/loss": round.loss / round.codes.count,
        "round/clients": float(round.codes.count),
        "round/dropped": float(round.dropped_count),
        "round/attempts": float(round.public.attempt + 1),
        "round/aggregate_norm": float(round.aggregate.norm()),
        "bytes/uplink_round": float(round.uplink),
        "bytes/uplink": float(traffic.uplink),
        "bytes/downlink": float(traffic.downlink),
        "bytes/codec": float(traffic.codec),
        "bytes/ratio": traffic.ratio(module.layout.dim),
    }
    if round.true is not None:
        true = round.true.mean().to(round.aggregate)
        figures["sim/relative_error"] = float(relative_error(round.aggregate, true))
        figures["sim/cosine"] = float(cosine(round.aggregate, true))
    return figures


def log_histogram(module: FederatedModule, round: Round) -> None:
    """Add a histogram of the mean code to TensorBoard, in the rounds in which the simulation compares."""
    if round.true is None or not module.trainer.is_global_zero:
        return
    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram("code/mean", round.codes.mean().cpu(), round.public.round)
            if round.codes.total is not None and round.codes.total.dtype == torch.int64:
                logger.experiment.add_histogram("code/sum", round.codes.total.cpu(), round.public.round)
