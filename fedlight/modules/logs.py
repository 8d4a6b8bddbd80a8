"""What a round logs."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.board import RunBoard
from fedlight.callbacks.pictures import energy_kept
from fedlight.core.layout import Layout
from fedlight.metrics import cosine, relative_error
from fedlight.rounds.call import Call
from fedlight.rounds.server import Server

SEEN_BY_SERVER_ALONE = ("round/clients", "round/absent", "round/dropped", "bytes/uplink_round", "bytes/handshake")
"""Exact counts of who took part, which nothing that is published under differential privacy may hold."""


def round_metrics(server: Server, call: Call, dim: int) -> dict[str, float]:
    """Return a round's metrics by log name, of a model of ``dim`` weights; `sim/` marks what only a simulation sees."""
    assert call.aggregate is not None
    traffic, seen = server.state.traffic, call.observed
    metrics = {"sim/loss": seen.loss / seen.trained} if server.aggregator.sim_logs and seen.trained else {}
    metrics |= {
        "round/clients": float(call.codes.count),
        "round/absent": float(call.absent),
        "round/dropped": float(call.dropped_count),
        "round/attempts": float(call.context.attempt + 1),
        "round/aggregate_norm": float(call.aggregate[:dim].norm()),
        "bytes/uplink_round": float(call.uplink),
        "bytes/uplink": float(traffic.uplink),
        "bytes/downlink": float(traffic.downlink),
        "bytes/codec": float(traffic.codec),
        "bytes/ratio": traffic.ratio(dim),
    }
    if server.codec.most_clients:
        metrics |= {"round/wrapped": float(call.codes.wrapped), "round/lost": call.codes.lost}
    if server.aggregator.hides_messages:
        metrics["bytes/handshake"] = float(traffic.handshake_up + traffic.handshake_down)
    if (privacy := server.privacy) is None:
        return metrics
    kept = {f"sim/{name.split('/')[1]}" if name in SEEN_BY_SERVER_ALONE else name: value for name, value in metrics.items()}
    return kept | {
        "privacy/epsilon": privacy.epsilon(amplified=False),
        "privacy/epsilon_if_cohorts_secret": privacy.epsilon(),
        "privacy/delta": privacy.delta,
        "privacy/noise_multiplier": privacy.multiplier,
        "privacy/clip": privacy.norm,
    }


def log_round(module: LightningModule, metrics: dict[str, float], step: int) -> None:
    """Give a round's metrics to the loggers (every `trainer.log_every_n_steps` rounds) and to callbacks that watch metrics.

    Not through `LightningModule.log`: it makes a Metric of every number, which takes as long as the messages of ten clients.
    """
    trainer = module.trainer
    trainer.callback_metrics.update({name: torch.tensor(value, device=module.device) for name, value in metrics.items()})
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every and (step + 1) % every == 0:
        for logger in module.loggers:
            logger.log_metrics(metrics, step=step)
            logger.save()


def log_comparison(module: FederatedRun, call: Call, length: int) -> None:
    """Log how far the first ``length`` numbers of the aggregate are from the true ones, and a histogram of the mean code.

    In the rounds in which the simulation compares. Straight to the loggers: `LightningModule.log` would repeat a number in every round
    until there is a new one.
    """
    seen = call.observed
    if seen.true is None or seen.true.total is None or not module.trainer.is_global_zero:
        return
    assert call.aggregate is not None
    decoded, true = call.aggregate[:length], seen.true.mean().to(call.aggregate)[:length]
    metrics = {
        "sim/relative_error": float(relative_error(decoded, true)),
        "sim/cosine": float(cosine(decoded, true)),
    }
    if seen.saturation:
        metrics["sim/saturation"] = sum(seen.saturation) / len(seen.saturation)
    code = call.codes.mean().cpu()
    for logger in module.loggers:
        logger.log_metrics(metrics, step=call.context.round)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram("codec/mean_code", code, call.context.round)
            if call.codes.total is not None and call.codes.total.dtype == torch.int64:
                logger.experiment.add_histogram("codec/sum_of_codes", call.codes.total.cpu(), call.context.round)
        if isinstance(logger, RunBoard):
            layout = Layout.of(module.network)
            logger.show_codes(code, call.context.round)
            logger.show_layers(energy_kept(layout, decoded[: layout.dim], true[: layout.dim]), layout, call.context.round)


def log_clients(module: LightningModule, accuracies: Tensor) -> None:
    """Give the clients' accuracies ``[clients]`` to TensorBoard as a histogram and a picture."""
    if not len(accuracies) or module.trainer.sanity_checking or not module.trainer.is_global_zero:
        return
    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram("clients/accuracy", accuracies, module.trainer.global_step)
        if isinstance(logger, RunBoard):
            logger.show_clients(accuracies, module.trainer.global_step)
