"""What a network is trained for and judged by: a classification, or a loss; a user's own LightningModule is in `own_steps`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlight.callbacks.base import FederatedRun
from fedlight.clients.copying import own_copy
from fedlight.clients.local_model import Augment, LocalModel
from fedlight.clients.personal import PersonalNorm, forward_with, personal_forward
from fedlight.core.codec import State
from fedlight.core.errors import ConfigurationError
from fedlight.data.samples import Collated
from fedlight.modules.evaluation import StageMetrics, log_clients

Stage = Literal["val", "test"]


class Task:
    """A loss and nothing else: any network on batches (inputs, targets), such as a regression or a language model."""

    def __init__(self, module: FederatedRun) -> None:
        self.module = module

    def build(self, stage: str) -> None:
        """Let the network make its parts, before anything is told its weights."""

    def setup(self, stage: str) -> None:
        """Check network and data before training starts."""
        refuse_classification_only(self.module)

    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what clients train, on the device that rounds run on."""
        module = self.module
        return LocalModel(module.network, self.loss, module.device, augment)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (0-d) of a local batch."""
        inputs, targets = pair_of(x.content) if isinstance(x, Collated) else (x, y)
        loss: Tensor = self.module.loss(network(inputs.to(y.device)), targets.to(y.device))
        return loss

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        data = self.module.data
        return data.source.offers("val") if data.source.has_loaders else data.val is not None

    def start(self) -> None:
        """Begin a fit."""

    def begin(self) -> bool:
        """Begin training; whether that may have changed what clients take copies of."""
        return False

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of the user's own module, if it is one."""

    def evaluate(self, stage: Stage, batch: Any, batch_idx: int, loader: int) -> Any:
        """Take in one batch of an evaluation set."""
        module = self.module
        x, y = pair_of(batch)
        module.log(f"{stage}/loss", module.loss(module.network(x), y), batch_size=len(y), sync_dist=True)

    def epoch_end(self, stage: Stage) -> None:
        """Log the figures of an evaluation that are not logged yet."""

    def predict(self, batch: Any, batch_idx: int, loader: int = 0) -> Any:
        """Return the network's output."""
        return self.module.network(pair_of(batch)[0] if isinstance(batch, (list, tuple)) else batch)


class Classification(Task):
    """Logits of classes on a data set in memory: loss, accuracy and its spread over clients."""

    metrics: StageMetrics
    norm: PersonalNorm

    def setup(self, stage: str) -> None:
        """Make the metrics, and run one sample through the network: a wrong shape is told before training and in its own words."""
        module = self.module
        if module.data.num_classes < 2:
            raise ConfigurationError(
                "Expected data of at least two classes to classify but all labels are 0: check them, or give a LightningModule or a `loss` "
                "with a data module of your own"
            )
        self.norm = PersonalNorm(module.network)
        self.metrics = module.stage_metrics = StageMetrics(
            module.data.num_classes, torch.from_numpy(module.data.client_sizes), module.own_metrics
        )
        x, classes = module.data.test[0][:1].cpu(), module.data.num_classes
        network = own_copy(module.network).cpu().eval()
        try:
            with torch.no_grad():
                logits = network(x)
        except RuntimeError as error:
            raise ConfigurationError(
                f"Expected a `network` that takes inputs {[1, *module.data.input_shape]} but {type(network).__name__} says: {error}"
            ) from error
        if logits.ndim != 2 or logits.shape[1] < classes:
            raise ConfigurationError(
                f"Expected a `network` with logits [n, {classes}] for {classes} classes but {type(network).__name__} makes "
                f"{list(logits.shape)} of one sample: set its number of classes{_unused(module.data.y)}"
            )
        few = module.data.test[0][:8].cpu()
        with torch.no_grad():
            self.metrics.try_own(network(few), module.data.test[1][:8].cpu())

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (0-d) of a local batch."""
        loss: Tensor = self.module.loss(network(x), y)
        return loss

    def evaluate(self, stage: Stage, batch: Any, batch_idx: int, loader: int) -> None:
        """Add a batch (x, y) of the server's data, or (x, y, client) of what clients hold out."""
        module = self.module
        x, y = batch[0], batch[1]
        if len(batch) == 2:
            logits = module(x)
            self.metrics.update(logits, y, module.loss(logits, y))
        elif module.batch_norm == "mean":
            self.metrics.update_clients(module(x), y, batch[2])
        else:
            for mine, kept in self._kept(batch[2]):  # the global model with the client's own normalisation layers
                logits = personal_forward(module.network, self.norm, kept.get("norm", {}), x[mine])
                self.metrics.update_clients(logits, y[mine], batch[2][mine])
        if len(batch) == 3 and module.algorithm.client_state:
            for mine, kept in self._kept(batch[2]):
                if (model := module.algorithm.personal(kept.get("algorithm", {}))) is not None:
                    weights, buffers = (part.to(module.device) for part in model)
                    logits = forward_with(module.network, weights, buffers, self.norm.names, x[mine])
                    self.metrics.personal.update(logits.argmax(-1), y[mine], batch[2][mine])

    def _kept(self, clients: Tensor) -> Iterator[tuple[Tensor, State]]:
        """Yield which samples are a client's, and what it keeps, as of its last attempt that counted, whether it heard of that or not."""
        for client in torch.unique(clients).tolist():
            yield clients == client, self.module.store.peek(client, self.module.server_state.settled.get(client))

    def epoch_end(self, stage: Stage) -> None:
        """Log loss, accuracy and spread."""
        module = self.module
        module.log_dict(self.metrics.compute(stage), batch_size=1, sync_dist=True)
        if stage == "val":
            log_clients(module, self.metrics.histogram)

    def predict(self, batch: Any, batch_idx: int, loader: int = 0) -> Any:
        """Return the predicted labels ``[n]``."""
        return self.module(batch).argmax(-1)


def _unused(labels: Tensor) -> str:
    """Return a hint where there are numbers up to the largest label that no sample has."""
    found = torch.unique(labels)
    last = int(found[-1]) if len(found) else -1
    return "" if len(found) == last + 1 else f", or number its {len(found)} classes from 0 (they are {int(found[0])} to {last})"


def pair_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a batch; raises ``ConfigurationError`` if it is no pair."""
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ConfigurationError(
        f"Expected batches (inputs, targets) for a network and a `loss` but got {type(batch).__name__}: give a LightningModule, whose "
        "`training_step` takes batches of any structure"
    )


def refuse_classification_only(module: FederatedRun) -> None:
    """Raise ``ConfigurationError`` for settings that only a classifying network on a data set in memory can honour."""
    if module.own_metrics:
        raise ConfigurationError(
            f"Expected no `metrics` but got {', '.join(module.own_metrics)}: they take the logits and labels of a classifying network on a "
            "data set in memory. Log them in `validation_step`"
        )
    if module.data.client_holdout:
        raise ConfigurationError(
            f"Expected `data.client_holdout` 0 but got {module.data.client_holdout}: accuracy per client needs a classifying network on a "
            "data set in memory. Evaluate in `validation_step`"
        )
