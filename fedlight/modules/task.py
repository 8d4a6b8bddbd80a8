"""What a network is trained for and judged by: a classification, a loss, or the steps of a user's own LightningModule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric

from fedlight.callbacks.base import FederatedRun
from fedlight.clients.copying import own_copy
from fedlight.clients.local_model import Augment, LocalModel
from fedlight.clients.personal import PersonalNorm, forward_with, personal_forward
from fedlight.core.errors import ConfigurationError
from fedlight.data.samples import Collated
from fedlight.modules.evaluation import StageMetrics
from fedlight.modules.logs import log_clients

Stage = Literal["val", "test"]


class Task:
    """A loss and nothing else: any network on batches (inputs, targets), such as a regression or a language model.

    Args:
        module: the federated module whose network it is.
    """

    def __init__(self, module: FederatedRun) -> None:
        self.module = module

    def setup(self, stage: str) -> None:
        """Check network and data before training starts."""
        _refuse_classification_only(self.module)

    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what clients train, on the device that rounds run on."""
        module = self.module
        return LocalModel(module.network, module.objective, module.device, augment)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (0-d) of a local batch."""
        inputs, targets = pair_of(x.content) if isinstance(x, Collated) else (x, y)
        loss: Tensor = self.module.loss(network(inputs.to(y.device)), targets.to(y.device))
        return loss

    def evaluate(self, stage: Stage, batch: Any, batch_idx: int, loader: int) -> None:
        """Take in one batch of an evaluation set."""
        module = self.module
        x, y = pair_of(batch)
        module.log(f"{stage}/loss", module.loss(module.network(x), y), batch_size=len(y), sync_dist=True)

    def epoch_start(self, stage: Stage) -> None:
        """Begin an evaluation."""

    def epoch_end(self, stage: Stage) -> None:
        """Log the figures of an evaluation that are not logged yet."""

    def predict(self, batch: Any, batch_idx: int) -> Any:
        """Return the network's output."""
        return self.module.network(pair_of(batch)[0] if isinstance(batch, (list, tuple)) else batch)


class Classification(Task):
    """Logits of classes on a data set in memory: loss, accuracy and its spread over clients."""

    metrics: StageMetrics
    norm: PersonalNorm

    def setup(self, stage: str) -> None:
        """Make the metrics, and run one sample through the network: a wrong shape is told before training and in its own words."""
        module = self.module
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
                f"{list(logits.shape)} of one sample: set its number of classes"
            )

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
            for client in torch.unique(batch[2]).tolist():
                mine = batch[2] == client
                self.metrics.update_clients(self._personal_logits(client, x[mine]), y[mine], batch[2][mine])
        if len(batch) == 3 and module.algorithm.client_state:
            self._evaluate_personal(x, y, batch[2])

    def _personal_logits(self, client: int, x: Tensor) -> Tensor:
        """Return logits ``[n, classes]`` of the global model with the client's own normalisation layers, as it was last trained."""
        return personal_forward(self.module.network, self.norm, self.module.store.peek(client).get("norm", {}), x)

    def _evaluate_personal(self, x: Tensor, y: Tensor, clients: Tensor) -> None:
        """Evaluate the personal models of those clients that have trained one."""
        module = self.module
        for client in torch.unique(clients).tolist():
            model = module.algorithm.personal(module.store.peek(client).get("algorithm", {}))
            if model is not None:
                mine = clients == client
                weights, buffers = (part.to(module.device) for part in model)
                logits = forward_with(module.network, weights, buffers, self.norm.names, x[mine])
                self.metrics.update_personal(logits, y[mine], clients[mine])

    def epoch_end(self, stage: Stage) -> None:
        """Log loss, accuracy and spread."""
        module = self.module
        module.log_dict(self.metrics.compute(stage), batch_size=1, sync_dist=True)
        if stage == "val":
            log_clients(module, self.metrics.histogram)

    def predict(self, batch: Any, batch_idx: int) -> Any:
        """Return the predicted labels ``[n]``."""
        return self.module(batch).argmax(-1)


class OwnSteps(Task):
    """A LightningModule's own `training_step` on the clients, its own `validation_step` and `test_step` on the server.

    What its evaluation logs is logged under its own names. What its `training_step` logs stays with the client.
    """

    def setup(self, stage: str) -> None:
        """Let the user's module set itself up, and refuse what local steps would not honour.

        Raises:
            ConfigurationError: naming the hook, and the way out.
        """
        module, own = self.module, self.own
        _refuse_classification_only(module)
        if getattr(module.data.source, "datamodule", None) is not own:  # else its set-up is done: it has loaded the data
            own.setup(stage)
        name = type(own).__name__
        if not own.automatic_optimization:
            raise ConfigurationError(
                f"Expected `network` to be a module with automatic optimization but {name} steps its optimizers by itself: return the loss "
                "from `training_step`, or federate each of its networks by itself"
            )
        for hook in ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"):
            if is_overridden(hook, own, LightningModule):
                raise ConfigurationError(
                    f"Expected a `network` whose local step is its `training_step` alone but {name} overrides `{hook}`, which clients do "
                    "not call: remove it, and choose the local step with `algorithm` (such as FedAvg with `max_grad_norm`)"
                )
        if not is_overridden("training_step", own, LightningModule):
            raise ConfigurationError(
                f"Expected `network` to have a `training_step` but {name} has none: write one, or give network and `loss`"
            )

    @property
    def own(self) -> LightningModule:
        """The user's module."""
        network = self.module.network
        assert isinstance(network, LightningModule)
        return network

    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what clients train."""
        module = self.module
        model = LocalSteps(module.network, module.objective, module.device, augment)
        model.attach(module)
        return model

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (0-d) of the user's `training_step`; a step that returns None has a loss of 0 and no gradient."""
        assert isinstance(network, LightningModule)
        batch = moved(network, x.content if isinstance(x, Collated) else [x, y], y.device)
        output = call_step(network.training_step, batch, network.__dict__["batch_idx"])
        network.__dict__["batch_idx"] += 1
        loss = output["loss"] if isinstance(output, dict) else output
        return torch.zeros((), device=y.device, requires_grad=True) if loss is None else loss

    def evaluate(self, stage: Stage, batch: Any, batch_idx: int, loader: int) -> None:
        """Run the user's own step, if there is one."""
        own, hook = self.own, {"val": "validation_step", "test": "test_step"}[stage]
        if is_overridden(hook, own, LightningModule):
            batch = list(batch) if isinstance(batch, tuple) else batch
            with self._speaking():
                call_step(getattr(own, hook), moved(own, batch, self.module.device), batch_idx, loader)

    def epoch_start(self, stage: Stage) -> None:
        """Call the user's own hook."""
        with self._speaking():
            {"val": self.own.on_validation_epoch_start, "test": self.own.on_test_epoch_start}[stage]()

    def epoch_end(self, stage: Stage) -> None:
        """Call the user's own hook."""
        with self._speaking():
            {"val": self.own.on_validation_epoch_end, "test": self.own.on_test_epoch_end}[stage]()

    def predict(self, batch: Any, batch_idx: int) -> Any:
        """Return what the user's own `predict_step` does."""
        return call_step(self.own.predict_step, moved(self.own, batch, self.module.device), batch_idx)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Let the user's `self.log` act as if the Trainer had called it: it looks for the name of the hook."""
        own = self.own
        own._current_fx_name = self.module._current_fx_name
        try:
            yield
        finally:
            own._current_fx_name = None


class LocalSteps(LocalModel):
    """A client's copy of a user's LightningModule: every client starts with batch 0, silent, and with metrics that have seen nothing."""

    def modes(self, module: nn.Module) -> list[bool]:
        """Return the modes that the module's parts were left in, which Lightning leaves alone."""
        return [part.training for part in module.modules()]

    def attach(self, module: FederatedRun) -> None:
        """Let the copy see the Trainer (which copies leave behind), and keep what it logs in a training step to itself."""
        own: Any = self.module
        own._trainer = module._trainer
        own.log = own.log_dict = lambda *_, **__: None
        self._metrics = [part for part in own.modules() if isinstance(part, Metric)]

    def load(self, weights: Tensor, buffers: Tensor, extras: Mapping[str, Tensor] | None = None) -> None:
        """Start from global weights ``[dim]``, buffers ``[buffer_dim]`` and the server's ``extras``."""
        super().load(weights, buffers, extras)
        self.module.__dict__["batch_idx"] = 0

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss (detached) and its gradient per parameter tensor on one batch; metrics forget it."""
        found = super().gradients(x, y)
        for metric in self._metrics:
            metric.reset()
        return found


def call_step(step: Callable[..., Any], batch: Any, batch_idx: int, loader: int = 0) -> Any:
    """Call a step of a LightningModule with as many of (batch, batch_idx, dataloader_idx) as it takes, like Lightning."""
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    several = inspect.Parameter.VAR_POSITIONAL in kinds
    count = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return step(*(batch, batch_idx, loader)[: 2 if several else count])


def moved(own: LightningModule, batch: Any, device: torch.device) -> Any:
    """Return the batch on a device, through the module's own transfer hooks."""
    batch = own.on_before_batch_transfer(batch, 0)
    return own.on_after_batch_transfer(own.transfer_batch_to_device(batch, device, 0), 0)


def pair_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a batch; raises ``ConfigurationError`` if it is no pair."""
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ConfigurationError(
        f"Expected batches (inputs, targets) for a network and a `loss` but got {type(batch).__name__}: give a LightningModule, whose "
        "`training_step` takes batches of any structure"
    )


def task_of(module: FederatedRun) -> Task:
    """Return what suits the network and the data."""
    if isinstance(module.network, LightningModule):
        return OwnSteps(module)
    return Classification(module) if module.data.source.loaders("test") is None else Task(module)


def _refuse_classification_only(module: FederatedRun) -> None:
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
