"""Metrics of the global model on the server's data, and of every client's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.tell import tell
from fedlight.core.errors import ConfigurationError
from fedlight.metrics import ClientSpread, accuracy_by_size
from fedlight.rounds.reduce import reduce_sum


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

    def update_personal(self, logits: Tensor, targets: Tensor, clients: Tensor) -> None:
        """Add what the clients' personal models make of a batch of their data, shaped as for ``update_clients``."""
        self.personal.update(logits.argmax(-1), targets, clients)

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
    """Return metrics by the name that each is logged under; those of a collection in a mapping as ``<its name>_<theirs>``.

    Raises:
        ConfigurationError: for a name that is taken, or something that is no metric.
    """
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
