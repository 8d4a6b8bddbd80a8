"""A user's own LightningModule, run as Lightning's Trainer would: its evaluation on the server, its training loop on every client."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric

from fedlight.callbacks.base import FederatedRun, tell
from fedlight.clients.local_model import Augment, LocalModel
from fedlight.core.errors import ConfigurationError
from fedlight.data.datamodule import LightningData
from fedlight.data.samples import Collated
from fedlight.modules.contract import FORWARDED, TRANSFER, check_contract, differences
from fedlight.modules.task import Classification, Stage, Task, refuse_classification_only
from fedlight.modules.views import ClientTrainer, Run, attach


class OwnSteps(Task):
    """A LightningModule's own `training_step` on the clients, its own `validation_step` and `test_step` on the server.

    What its evaluation logs is logged under its own names. What its `training_step` logs stays with the client.
    """

    _started = False

    def build(self, stage: str) -> None:
        """Let the user's module set itself up and make its layers; raises ``ConfigurationError`` for what clients would not honour."""
        own, source = self.own, self.module.data.source
        if isinstance(source, LightningData) and source.datamodule is own:
            source.set_up(stage)  # which it may have been, to load the data
        else:
            own.setup(stage)
        own.configure_model()
        check_contract(own, self.module.algorithm)
        self._started = False

    def setup(self, stage: str) -> None:
        """Let the Trainer call the user's hooks of evaluation, and say what is different for clients."""
        module, own = self.module, self.own
        refuse_classification_only(module)
        for hook in FORWARDED:
            module.__dict__.pop(hook, None)
            if is_overridden(hook, own, LightningModule):
                module.__dict__[hook] = _Forward(self, hook)
        for hook in TRANSFER:
            module.__dict__.pop(hook, None)
            if _transferring(hook, own, self.module.own_datamodule) is not None:
                module.__dict__[hook] = _Transfer(self, hook)
        if stage == "fit":
            source = module.data.source
            loader = source.loader if isinstance(source, LightningData) else None
            if found := differences(own, module.algorithm, loader):
                tell(f"{type(own).__name__} is trained by clients, otherwise than by a Trainer: {'; '.join(found)}")

    @property
    def own(self) -> LightningModule:
        """The user's module."""
        network = self.module.network
        assert isinstance(network, LightningModule)
        return network

    def start(self) -> None:
        """Call what the Trainer calls once before a fit's first training step can be made, unless it has been called."""
        if not self._started:
            self._started = True
            self.call("on_fit_start")

    def begin(self) -> bool:
        """Call the user's own hook, which may make what clients' copies need."""
        self.call("on_train_start")
        return is_overridden("on_train_start", self.own, LightningModule)

    @property
    def validates(self) -> bool:
        """Whether there is a validation step and anything to validate on."""
        return is_overridden("validation_step", self.own, LightningModule) and super().validates

    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what clients train."""
        module = self.module
        if module._trainer is not None and module._trainer.state.fn == "fit":
            self.start()
        return LocalSteps(module, augment)

    def call(self, hook: str, *arguments: Any) -> Any:
        """Call a hook of the user's module, whose `self.log` acts as if the Trainer had called it."""
        with speaking(self.own, hook):
            return getattr(self.own, hook)(*arguments)

    def evaluate(self, stage: Stage, batch: Any, batch_idx: int, loader: int) -> Any:
        """Run the user's own step, if there is one, and return its output."""
        own, hook = self.own, {"val": "validation_step", "test": "test_step"}[stage]
        if not is_overridden(hook, own, LightningModule):
            return None
        batch = list(batch) if isinstance(batch, tuple) else batch
        with speaking(own, self.module._current_fx_name):
            return call_step(getattr(own, hook), batch, batch_idx, loader)

    def epoch_end(self, stage: Stage) -> None:
        """Call the user's own hook."""
        self.call({"val": "on_validation_epoch_end", "test": "on_test_epoch_end"}[stage])

    def predict(self, batch: Any, batch_idx: int, loader: int = 0) -> Any:
        """Return what the user's own `predict_step` does."""
        with speaking(self.own, self.module._current_fx_name):
            return call_step(self.own.predict_step, batch, batch_idx, loader)


class LocalSteps(LocalModel):
    """A client's copy of a user's LightningModule in the training loop that the Trainer would run: its hooks in the same order.

    Every client starts with batch 0, silent, and with metrics that have seen nothing.
    """

    def __init__(self, run: Run, augment: Augment | None) -> None:
        super().__init__(run.network, self.training_loss, run.device, augment)
        own = self._own
        # Copies leave their Trainer behind. Every module within gets the client's, and keeps what it logs in a step to itself.
        self.client = ClientTrainer(run, self)
        attach(own, self.client)
        for part in own.modules():
            if isinstance(part, LightningModule):
                part.__dict__.update(log=_keep, log_dict=_keep)
        self._transfers = [_transferring(hook, own, run.own_datamodule) for hook in TRANSFER]
        self._metrics = {name: part for name, part in own.named_modules() if isinstance(part, Metric)}
        self._called = {hook for hook in _LOOP if is_overridden(hook, own, LightningModule)}
        self._taken = arguments_of(own.training_step)
        self._batch: Any = None  # the current one, as the step takes it
        self._number = 0
        self._output: dict[str, Any] = {}
        self._told = False

    @property
    def _own(self) -> LightningModule:
        assert isinstance(self.module, LightningModule)
        return self.module

    def modes(self, module: nn.Module) -> list[bool]:
        """Return the modes that the module's parts were left in, which Lightning leaves alone."""
        return [part.training for part in module.modules()]

    def load(self, weights: Tensor, buffers: Tensor, extras: Mapping[str, Tensor] | None = None) -> None:
        """Start from global weights ``[dim]``, buffers ``[buffer_dim]`` and the server's ``extras``."""
        super().load(weights, buffers, extras)
        self.client.__dict__.update(begun=0, finished=0, stopped=False, used=[], scheduled=[])
        self._batch, self._number, self._output = None, 0, {}
        for metric in self._metrics.values():
            metric.reset()

    def attend(self, optimizer: torch.optim.Optimizer, schedulers: Any) -> None:
        """Show the module its optimizer and schedules."""
        self.client.__dict__.update(used=[optimizer], scheduled=list(schedulers))

    def batches(
        self, x: Tensor, y: Tensor, batch_size: int, epochs: int | None, steps: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of all epochs, with the Trainer's hooks around each epoch and each batch."""
        client, before = self.client.__dict__, _numbers(self._own)
        for one in self.epochs(x, y, batch_size, epochs, steps, generator):
            self._hook("on_train_epoch_start")
            for number, (xb, yb) in enumerate(one):
                self._number, self._batch = number, self._moved(xb, yb)
                batch = self._batch
                if self._hook("on_train_batch_start", batch, number) == -1:
                    break
                yield xb, yb
                client["begun"] += 1
                self._hook("on_train_batch_end", self._output, batch, number)
            self._batch, self._output = None, {}
            self._hook("on_train_epoch_end")
            client["finished"] += 1
            if client["stopped"]:
                break
        self._tell_forgotten(before)

    def _tell_forgotten(self, before: Mapping[str, float]) -> None:
        """Say once which numbers and metrics of the module training has changed, and no round hands on to the next."""
        if self._told:
            return
        now = _numbers(self._own)
        changed = [name for name, value in before.items() if now.get(name, value) != value]
        counted = [name for name, metric in self._metrics.items() if metric.update_called and any(metric._persistent.values())]
        self._told = bool(changed or counted)
        if counted:
            tell(
                f"Training updates `{counted[0]}` of {type(self._own).__name__}, a metric whose state is persistent, but every client "
                "begins every round with one that has seen nothing, and no checkpoint holds what clients count: measure in "
                "`validation_step`, or keep it in a buffer (`register_buffer`)"
            )
        if changed:
            tell(
                f"Training changes `{changed[0]}` of {type(self._own).__name__}, but every client begins every round with it as it was "
                "when training began: make what rounds hand on a buffer (`register_buffer`), or let it follow from `self.current_epoch`"
            )

    def training_loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (0-d) of the user's step; one that returns None has a loss of 0 and no gradient."""
        own, training = self._own, torch.is_grad_enabled()
        # Not in an epoch: a measurement without gradients, or the gradient of all samples.
        moved = self._batch if training and self._batch is not None else self._moved(x, y)
        output = own.training_step(*(moved, self._number)[: self._taken])
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(output, Mapping) and loss is None:
            found = "None there: return None alone to leave a batch out" if "loss" in output else ", ".join(output)
            raise ConfigurationError(f"Expected `training_step` to return a loss under 'loss' but it returned {found}")
        if loss is not None and not isinstance(loss, Tensor):
            raise ConfigurationError(f"Expected `training_step` to return a loss, a dict with one, or None but it returned {loss!r:.80}")
        extra = {name: value for name, value in output.items() if name != "loss"} if isinstance(output, Mapping) else {}
        self._output = {} if loss is None else {"loss": loss.detach(), **extra}
        if loss is None:
            loss = torch.zeros((), device=y.device, requires_grad=True)
        if training:
            self._hook("on_before_zero_grad", *self.client.used)
            if "on_before_backward" in self._called:
                for parameter in self.flat.parameters:
                    parameter.grad = None
                self._hook("on_before_backward", loss)
        return loss

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss (detached) and its gradient per parameter tensor on one batch, as the user's hooks leave it."""
        loss, grads = super().gradients(x, y)
        if not {"on_after_backward", "on_before_optimizer_step"} & self._called:
            return loss, grads
        self._hook("on_after_backward")
        self._hook("on_before_optimizer_step", *self.client.used)
        self.flat.take_over()
        self.reached = [parameter.grad is not None for parameter in self.flat.parameters]
        kept = tuple(torch.zeros_like(p.detach()) if p.grad is None else p.grad for p in self.flat.parameters)
        return loss, kept

    def _hook(self, name: str, *arguments: Any) -> Any:
        if name not in self._called:
            return None
        with speaking(self._own, name):
            return getattr(self._own, name)(*arguments)

    def _moved(self, x: Tensor, y: Tensor) -> Any:
        """Return the batch on the device, through the transfer hooks of the data module or of the copy."""
        batch = x.content if isinstance(x, Collated) else [x, y]
        if y.device.type == "cpu" and not any(self._transfers) and _of_tensors(batch):  # where batches are made
            return batch
        before, move, after = (hook or getattr(self._own, name) for hook, name in zip(self._transfers, TRANSFER, strict=True))
        return after(move(before(batch, 0), y.device, 0), 0)


_LOOP = (
    *("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
)


class _Forward:
    """Calls a hook of the user's module where the Trainer calls it on ours."""

    def __init__(self, task: OwnSteps, hook: str) -> None:
        self.task = task
        self.hook = hook
        self.__wrapped__ = self.target()  # where Lightning looks for a hook's arguments, and whether it is overridden

    def target(self) -> Callable[..., Any]:
        """Return the user's hook."""
        return getattr(self.task.own, self.hook)  # type: ignore[no-any-return]

    def __call__(self, *arguments: Any) -> Any:
        return self.task.call(self.hook, *arguments)


class _Transfer(_Forward):
    """Passes batches of evaluation, not the numbers of rounds, through the user's transfer hook."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        module = self.task.module
        if module.trainer.training:
            return getattr(LightningModule, self.hook)(module, *arguments, **named)
        return self.target()(*arguments, **named)

    def target(self) -> Callable[..., Any]:
        """Return the user's hook, of the data module or of the module."""
        found = _transferring(self.hook, self.task.own, self.task.module.own_datamodule)
        assert found is not None
        return found


def _transferring(hook: str, own: LightningModule, datamodule: LightningDataModule | None) -> Callable[..., Any] | None:
    """Return the transfer hook that the user wrote, of the data module before the module, as Lightning has it; None if there is none."""
    if datamodule is not None and is_overridden(hook, datamodule, LightningDataModule):
        return getattr(datamodule, hook)  # type: ignore[no-any-return]
    return getattr(own, hook) if is_overridden(hook, own, LightningModule) else None


def _numbers(own: LightningModule) -> dict[str, float]:
    """Return the attributes of a module that are numbers."""
    return {name: value for name, value in vars(own).items() if type(value) in (int, float) and not name.startswith("_")}


def _of_tensors(batch: Any) -> bool:
    """Whether a batch is a tensor, or a list or dict of tensors: what Lightning leaves alone where it is."""
    parts = batch.values() if type(batch) is dict else batch if type(batch) in (list, tuple) else (batch,)
    return all(type(part) is Tensor for part in parts)


def _keep(*_: Any, **__: Any) -> None:
    """Stand in for `self.log` on a client."""


@contextmanager
def speaking(own: LightningModule, hook: str | None) -> Iterator[None]:
    """Let the user's `self.log` act as if the Trainer had called this hook, whose name it looks for."""
    before, own._current_fx_name = own._current_fx_name, hook
    try:
        yield
    finally:
        own._current_fx_name = before


def call_step(step: Callable[..., Any], batch: Any, batch_idx: int, loader: int = 0) -> Any:
    """Call a step of a LightningModule with as many of (batch, batch_idx, dataloader_idx) as it takes, like Lightning."""
    return step(*(batch, batch_idx, loader)[: arguments_of(step)])


def arguments_of(step: Callable[..., Any]) -> int:
    """Return how many of (batch, batch_idx, dataloader_idx) a step takes."""
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    several = inspect.Parameter.VAR_POSITIONAL in kinds
    count = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return 2 if several else count


def task_of(module: FederatedRun) -> Task:
    """Return what suits the network and the data."""
    if isinstance(module.network, LightningModule):
        return OwnSteps(module)
    return Task(module) if module.data.source.has_loaders else Classification(module)
