"""All that Lightning calls, reads or sets in a module, a data module and a loader, and what becomes of it in a federated run.

Names that are not called as they are anyway are listed here: passed on, refused before training, or different (said once at the start,
where it is used). `tests/modules/test_contract.py` lists the others, and walks Lightning's own names.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from fedlight.clients.algorithms import Algorithm
from fedlight.clients.own_optimizer import ClientOptimizer
from fedlight.core.errors import ConfigurationError

TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Hooks that batches pass, of the data module if it has them, else of the module: on clients and in evaluation."""

FORWARDED = (
    *("on_fit_end", "on_validation_start", "on_validation_end", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_epoch_start", "on_test_epoch_start"),
    *("on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train"),
    *("on_test_start", "on_test_end", "on_test_batch_start", "on_test_batch_end", "on_test_model_eval", "on_test_model_train"),
    *("on_predict_start", "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end"),
    *("on_predict_batch_start", "on_predict_batch_end", "on_predict_model_eval"),
)
"""Hooks that the Trainer calls on the user's own module where they are overridden, as it would without federation."""

REFUSED: Mapping[str, str] = {
    "backward": "choose the local step with `algorithm`",
    "optimizer_step": "choose the local step with `algorithm`, or its rate with a schedule",
    "optimizer_zero_grad": "choose the local step with `algorithm`",
    "configure_gradient_clipping": "call `self.clip_gradients` in `on_before_optimizer_step`, or choose FedAvg with `max_grad_norm`",
    "lr_scheduler_step": "return one of torch's schedules, which every round takes up where the last one ended",
    "configure_sharded_model": "make the layers in `configure_model`",
    "automatic_optimization": "return the loss from `training_step`",
}
"""Overridden, or set to something else, before training: with the way out."""

WITH_OPTIMIZER = ("on_before_zero_grad", "on_before_optimizer_step")
"""Hooks that are given the optimizer, which only ClientOptimizer has."""

DIFFERENT: Mapping[str, str] = {
    "on_train_start": "is called once, before clients take their copies: what it changes later reaches no client",
    "on_train_end": "is called once, on the server's module, which no client's training has changed but for its weights",
    "on_train_epoch_start": "is called for every epoch of every client, on the client's copy",
    "on_train_epoch_end": "is called for every epoch of every client; what it logs stays with the client",
}
"""Called otherwise than a user may think: said once at the start."""

LOADER_DIFFERENT: Mapping[str, str] = {
    "batch_size": "local batches have the `batch_size` of `algorithm`",
    "worker_init_fn": "no worker loads a client's items, so that nobody calls it",
    "generator": "clients draw their order from the run's `seed`",
}
"""Of the training loader, where it is not the default: said once at the start."""


def check_contract(own: LightningModule, algorithm: Algorithm) -> None:
    """Refuse what clients would not honour; raises ``ConfigurationError`` naming the hook, and the way out."""
    name = type(own).__name__
    if not own.automatic_optimization:
        raise ConfigurationError(
            f"Expected `network` to be a module with automatic optimization but {name} steps its optimizers by itself: return the loss "
            "from `training_step`, or federate each of its networks by itself"
        )
    for hook, way_out in REFUSED.items():
        if hook != "automatic_optimization" and is_overridden(hook, own, LightningModule):
            raise ConfigurationError(
                f"Expected a `network` whose local step is its `training_step` alone but {name} overrides `{hook}`, which clients do "
                f"not call: remove it, and {way_out}"
            )
    if not is_overridden("training_step", own, LightningModule):
        raise ConfigurationError(f"Expected `network` to have a `training_step` but {name} has none: write one, or give network and `loss`")
    if "dataloader_iter" in inspect.signature(own.training_step).parameters:
        raise ConfigurationError(
            f"Expected a `training_step` of one batch but that of {name} takes `dataloader_iter`, which clients lack: take the batch"
        )
    for hook in WITH_OPTIMIZER:
        if not isinstance(algorithm, ClientOptimizer) and is_overridden(hook, own, LightningModule):
            raise ConfigurationError(
                f"Expected ClientOptimizer, which has an optimizer to give to `{hook}` of {name}, but got {type(algorithm).__name__}: "
                "leave `algorithm` out, or move it to `on_after_backward` or `on_train_batch_end`"
            )


def differences(own: LightningModule, algorithm: Algorithm, loader: DataLoader[Any] | None) -> list[str]:
    """Return what is different for clients of this module and loader, a clause each."""
    found = [f"`{hook}` {what}" for hook, what in DIFFERENT.items() if is_overridden(hook, own, LightningModule)]
    if loader is not None:
        size = getattr(algorithm, "batch_size", loader.batch_size)
        own_size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
        settings = {
            "batch_size": own_size not in (None, 1, size),
            "worker_init_fn": loader.worker_init_fn is not None,
            "generator": loader.generator is not None,
        }
        found += [f"the loader's `{name}` is not used: {LOADER_DIFFERENT[name]}" for name, used in settings.items() if used]
    return found
