"""Metrics of the global model on the server's data, and of every client's own, and what a round logs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fedlight.callbacks.base import FederatedRun, tell
from fedlight.callbacks.board import RunBoard, energy_kept
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.metrics import ClientSpread, accuracy_by_size, cosine, relative_error
from fedlight.rounds.call import Call
from fedlight.rounds.reduce import reduce_sum
from fedlight.rounds.server import Server


class StageMetrics(nn.Module):
    """Loss, accuracy, metrics of the user's own, and how accuracy is spread over clients, for one stage of one run."""

    def __init__(self, num_classes: int, sizes: Tensor, own: Mapping[str, Metric]) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.clients = ClientSpread(len(sizes))
        self.personal = ClientSpread(len(sizes))  # of the clients' own models, where they have any
        self.sizes = sizes
        self.own = nn.ModuleDict(own)
        self.histogram = torch.empty(0)

    def update(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add a batch of the server's data: logits ``[n, classes]``, targets ``[n]``, mean loss (0-d)."""
        self.loss.update(loss, weight=len(targets))
        self.accuracy.update(logits, targets)
        for metric in self.own_metrics().values():
            metric.update(logits, targets)

    def update_clients(self, logits: Tensor, targets: Tensor, clients: Tensor) -> None:
        """Add a batch of the clients' own data: logits ``[n, classes]``, targets and client ids ``[n]``."""
        self.clients.update(logits.argmax(-1), targets, clients)

    def own_metrics(self) -> dict[str, Metric]:
        """Return the user's metrics by name."""
        return {name: metric for name, metric in self.own.items() if isinstance(metric, Metric)}

    def try_own(self, logits: Tensor, targets: Tensor) -> None:
        """Try the user's metrics on a few logits ``[n, classes]`` and targets ``[n]``; raises ``ConfigurationError`` for one that fails."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that so few samples lack
            for name, metric in self.own_metrics().items():
                copy = metric.clone()
                copy.reset()
                try:
                    copy.update(logits, targets)
                    one_number(name, copy)
                except (RuntimeError, ValueError, TypeError) as error:
                    if isinstance(error, ConfigurationError):
                        raise
                    raise ConfigurationError(
                        f"Expected `metrics` of logits {list(logits.shape)} and labels {list(targets.shape)} but {name!r} "
                        f"({type(metric).__name__}) says: {error}"
                    ) from error

    def compute(self, stage: str) -> dict[str, float]:
        """Return the figures by log name, and start anew."""
        figures = {f"{stage}/loss": float(self.loss.compute()), f"{stage}/accuracy": float(self.accuracy.compute())}
        if self.clients.update_called:
            figures |= {f"{stage}/client_accuracy_{name}": float(value) for name, value in self.clients.compute().items()}
            # Of all processes: each has seen a part of the clients, and all must log the same names.
            correct, total = reduce_sum(self.clients.correct.clone()).cpu(), reduce_sum(self.clients.total.clone()).cpu()
            by_size = accuracy_by_size(correct, total, self.sizes)
            figures |= {f"{stage}/client_accuracy_{name}": float(value) for name, value in by_size.items()}
            seen = total > 0
            self.histogram = correct[seen] / total[seen]
        if self.personal.update_called:
            figures |= {f"{stage}/personal_accuracy_{name}": float(value) for name, value in self.personal.compute().items()}
        figures |= {f"{stage}/{name}": one_number(name, metric) for name, metric in self.own_metrics().items()}
        for metric in (*self.own_metrics().values(), self.personal, self.loss, self.accuracy, self.clients):
            metric.reset()
        return figures


TAKEN = ("loss", "accuracy", "client_accuracy", "personal_accuracy")
"""Names of what is logged anyway, or how they begin."""


def named_metrics(metrics: Mapping[str, Metric | MetricCollection] | MetricCollection) -> dict[str, Metric]:
    """Return metrics by logged name, ``<its name>_<theirs>`` in a collection; raises ``ConfigurationError`` for a name that is taken."""
    found: dict[str, Metric] = {}
    for name, metric in metrics.items():
        parts = {f"{name}_{inner}": one for inner, one in metric.items()} if isinstance(metric, MetricCollection) else {name: metric}
        for full, one in parts.items():
            if not isinstance(one, Metric):
                raise ConfigurationError(f"Expected `metrics` of TorchMetrics by name but {full!r} is a {type(one).__name__}")
            if full in found or full in TAKEN[:2] or full.startswith(TAKEN[2:]) or "." in full:
                raise ConfigurationError(
                    f"Expected names of `metrics` that are free and without dots but got {full!r}: `val/loss`, `val/accuracy` and clients' "
                    "accuracies are logged anyway; choose another name"
                )
            found[full] = one
    return found


def one_number(name: str, metric: Metric) -> float:
    """Return a metric's value; raises ``ConfigurationError`` if it is not a single number, such as a confusion matrix."""
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ConfigurationError(
            f"Expected `metrics` of one number each but {name!r} ({type(metric).__name__}) makes {type(value).__name__}: choose an average"
        )
    return float(value)


def warn_of_unseen_models(module: FederatedRun) -> None:
    """Warn, before training, of personal models that no held-out data of their clients will ever evaluate."""
    if module.algorithm.personal_models and not module.data.client_holdout:
        tell(
            f"{type(module.algorithm).__name__} trains a model of its own for every client but `data.client_holdout` is 0, so that none of "
            "them is evaluated: they only go into checkpoints. Hold out a share of every client's samples, such as `data.client_holdout` "
            "0.2 (for a classifying network on a data set in memory), or take FedAvg, which saves their training"
        )


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
