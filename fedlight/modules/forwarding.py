"""What a FederatedModule passes on: its loaders, its evaluation, and all that belongs to the network that it was given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from fedlight.callbacks.base import FederatedRun, section
from fedlight.core.checkpoint import read_checkpoint
from fedlight.core.errors import require
from fedlight.modules.checkpoints import local_path
from fedlight.modules.task import Task
from fedlight.modules.views import OwnTrainer, attach

_PLAIN = frozenset((bool, int, float, str, type(None)))


class Forwarding(FederatedRun):
    """Loaders come from the data, evaluation and prediction from the task."""

    # A checkpoint's hyperparameters are those of the user's module, which plain Lightning loads from it.
    CHECKPOINT_HYPER_PARAMS_KEY = "federated_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "federated_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "federated_hparams_type"

    task: Task

    def prepare_data(self) -> None:
        """Fetch the data that no Trainer was given, and let the user's module fetch what it needs."""
        if self.own_data is not None:
            self.own_data.prepare_data()
        if self._own is not None and self._user_data is not self._own:
            self._own.prepare_data()

    def train_dataloader(self) -> Any:
        """Return the rounds, of a Trainer that was given no data module."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        """Return the validation loaders, of a Trainer that was given no data module."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Return the test loaders, of a Trainer that was given no data module."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the loaders to predict, of a Trainer that was given no data module."""
        return self.data.predict_dataloader()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate the global model on the server's data, and on what clients hold out."""
        with section(self.trainer, "validation"):
            return self.task.evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate the global model on the test set."""
        return self.task.evaluate("test", batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self.task.epoch_end("val")

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self.task.epoch_end("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the predicted labels ``[n]``, or what the network makes of the batch where it is no classification."""
        return self.task.predict(batch, batch_idx, dataloader_idx)

    @property
    def module(self) -> nn.Module:
        """The network that was given, with the global model's weights: your own LightningModule, for example."""
        return self.network

    def __getattr__(self, name: str) -> Any:
        """Say where an attribute of the network's is, which callbacks may look for here."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            network = self.__dict__.get("_modules", {}).get("network")
            if network is None or name.startswith("_") or not hasattr(network, name):
                raise
            kind = type(self).__name__
            raise AttributeError(
                f"Expected an attribute of {kind} but {name!r} is one of its {type(network).__name__}: read it from `{kind}.module`"
            ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse in a run what is meant for the network, which callbacks may set here."""
        network = self.__dict__.get("_modules", {}).get("network")
        foreign = network is not None and self.__dict__.get("_trainer") is not None and not name.startswith("_") and not _has(self, name)
        if foreign and _has(network, name):
            kind = type(self).__name__
            raise AttributeError(
                f"Expected an attribute of {kind} but {name!r} is one of its {type(network).__name__}: set it in `{kind}.module`, and in "
                "`setup` or `on_fit_start`, before clients take their copies"
            )
        super().__setattr__(name, value)

    @property
    def _own(self) -> LightningModule | None:
        return self.network if isinstance(self.network, LightningModule) else None

    @property
    def _user_data(self) -> Any:
        """The user's data module, or module with loaders, that clients' data come from; None if fedlight's sources do."""
        return getattr(self.data.source, "datamodule", None)

    def attach_own(self) -> None:
        """Show the user's module and data module the Trainer as they would know it."""
        own, data, view = self._own, self._user_data, OwnTrainer(self)
        if own is not None:
            attach(own, view)
            self.example_input_array = own.example_input_array
        if isinstance(data, LightningDataModule):
            data.trainer = view
        for part in (own, data):
            if part is not None:
                self.prepare_data_per_node = self.prepare_data_per_node and part.prepare_data_per_node

    def own_callbacks(self) -> list[Callback]:
        """Return the callbacks that the user's module brings, and one that tells the data module of exceptions."""
        found: Any = self._own.configure_callbacks() if self._own is not None else []
        callbacks: list[Callback] = list(found) if isinstance(found, (list, tuple)) else [found]
        data, given = self._user_data, self.trainer.callbacks  # type: ignore[attr-defined]
        told = any(isinstance(callback, _OnException) and callback.data is data for callback in given)  # since an earlier stage
        return [*callbacks, *([_OnException(data)] if isinstance(data, LightningDataModule) and not told else [])]

    def teardown(self, stage: str) -> None:
        """Let the user's data module and module clean up."""
        data, own = self._user_data, self._own
        for part in (data, own) if data is not own else (own,):
            if part is not None:
                part.teardown(stage)

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold every weight: what the user's module says."""
        return self._own.strict_loading if self._own is not None else self._strict_loading in (None, True)

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self._strict_loading = strict_loading

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the state; of a user's LightningModule under its own names, so that its `load_from_checkpoint` reads it."""
        if self._own is None:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination = {} if destination is None else destination
        for name, value in self._own.state_dict().items():
            destination[prefix + name] = value if keep_vars or not isinstance(value, Tensor) else value.detach()
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` returned."""
        if self._own is None:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        return self._own.load_state_dict(state_dict, strict=strict, **({"assign": True} if assign else {}))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Read what ``state_dict`` returned for a part of another module, such as Lightning's averages of weights."""
        if self._own is not None and prefix:
            for name in [name for name in state_dict if name.startswith(prefix)]:
                state_dict[f"{prefix}network.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def save_own(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what plain Lightning would: hyperparameters, the data module's state, what the user's hook adds."""
        own, data = self._own, self._user_data
        if own is not None:
            plain = {name: value for name, value in own.hparams.items() if _is_plain(value)}
            if plain:
                checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY] = plain
                if hasattr(own, "_hparams_name"):
                    checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_NAME] = own._hparams_name
            own.on_save_checkpoint(checkpoint)
        if isinstance(data, LightningDataModule) and (state := data.state_dict()):
            checkpoint[type(data).__qualname__] = state

    def load_own(self, checkpoint: dict[str, Any]) -> None:
        """Give the user's module and data module back what they saved."""
        if self._own is not None:
            self._own.on_load_checkpoint(checkpoint)
        data = self._user_data if self._trainer is not None else None
        if isinstance(data, LightningDataModule) and type(data).__qualname__ in checkpoint:
            data.load_state_dict(checkpoint[type(data).__qualname__])

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a module with a checkpoint's weights, made of `network` and the other arguments, which a checkpoint does not hold.

        Raises:
            ConfigurationError: if the checkpoint is damaged, no file of this machine or holds objects, or `network` is missing.
        """
        require(
            "network" in kwargs,
            "Expected `network`, which a checkpoint holds the weights of but not the class, but got none: "
            f"{cls.__name__}.load_from_checkpoint(path, network=MyModule()).module, or MyModule.load_from_checkpoint(path) for a "
            "LightningModule of your own",
        )
        path = local_path(checkpoint_path)
        objects = weights_only is False
        read_checkpoint(path, objects)  # Lightning, which reads it again, compares no digest
        return super().load_from_checkpoint(path, map_location, hparams_file, strict, weights_only=not objects, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the rounds behind, which every fit makes, as Lightning's modules do their Trainer."""
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("server", "_connection", "task")}


class _OnException(Callback):
    """Tells the user's data module of an exception, as the Trainer would if it had been given it."""

    def __init__(self, data: LightningDataModule) -> None:
        self.data = data

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Pass on."""
        self.data.on_exception(exception)


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module holds an attribute, or its class says that it will; nothing is computed to find out."""
    own = vars(module)
    tables = [own, own["_modules"], own["_parameters"], own["_buffers"]]
    tables += [table for kind in type(module).__mro__ for table in (vars(kind), inspect.get_annotations(kind))]
    return any(name in table for table in tables)


def _is_plain(value: Any) -> bool:
    """Whether torch loads a value from a checkpoint without running code."""
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) for key in value) and _is_plain([*value.values()])
    if type(value) in (list, tuple):
        return _PLAIN.issuperset(map(type, value)) or all(map(_is_plain, value))
    return type(value) in _PLAIN or isinstance(value, Tensor)
