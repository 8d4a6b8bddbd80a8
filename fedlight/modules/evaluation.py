"""Metrics of the global model on the server's data, and of every client's own."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fedlight.metrics import ClientSpread


class StageMetrics(nn.Module):
    """Loss, accuracy and the spread of accuracy over clients, for one stage of one run."""

    def __init__(self, num_classes: int, num_clients: int) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.clients = ClientSpread(num_clients)

    def update(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add a batch of the server's data: logits ``[n, classes]``, targets ``[n]``, mean loss (0-d)."""
        self.loss.update(loss, weight=len(targets))
        self.accuracy.update(logits, targets)

    def update_clients(self, logits: Tensor, targets: Tensor, clients: Tensor) -> None:
        """Add a batch of the clients' own data: logits ``[n, classes]``, targets and client ids ``[n]``."""
        self.clients.update(logits.argmax(-1), targets, clients)

    def compute(self, stage: str) -> dict[str, float]:
        """Return the figures by log name, and start anew."""
        figures = {f"{stage}/loss": float(self.loss.compute()), f"{stage}/accuracy": float(self.accuracy.compute())}
        if self.clients.update_called:
            figures |= {f"{stage}/client_accuracy_{name}": float(value) for name, value in self.clients.compute().items()}
        for metric in (self.loss, self.accuracy, self.clients):
            metric.reset()
        return figures
