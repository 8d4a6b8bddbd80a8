"""What goes into a checkpoint beyond weights and optimizer, and which Trainers a federated run can have."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from fedlight.callbacks.base import FederatedRun
from fedlight.clients.auto import Auto
from fedlight.core.checkpoint import RUN
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.export import codec_state, restore_codec
from fedlight.core.fingerprint import describe, describe_network, name_of
from fedlight.core.flags import FLAGS, NO_ROUNDS, refused_flag
from fedlight.core.layout import trainable
from fedlight.modules.checkpoints import CLIENTS, CLIENTS_FILE


def check_trainer(trainer: Trainer) -> None:
    """Refuse Trainer flags that mean something else in a federated run; raises ``ConfigurationError`` naming the flag and the way out."""
    if refused := refused_flag({name: getattr(trainer, name, None) for name in FLAGS}):
        raise ConfigurationError(refused)
    if trainer.state.fn == "fit" and not trainer.fit_loop._data_source.is_module():
        raise ConfigurationError(
            "Expected a FederatedDataModule, or the data that `fedlight.federate` was given, but got `train_dataloaders`, whose batches "
            "would be taken for rounds: give `fedlight.federate` a LightningDataModule, and the Trainer the module alone"
        )
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise ConfigurationError(
            f"Expected `trainer.precision` 32-true or bf16-mixed but got {trainer.precision}: updates are float32 differences of "
            "weights, and local training scales no losses. Leave it out, or convert the network itself, such as by `.double()`"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ConfigurationError(
            f"Expected `trainer.strategy` auto or ddp but got {type(trainer.strategy).__name__}: every process needs the whole model"
        )
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise ConfigurationError("Expected `trainer.sync_batchnorm` false but got true: it would mix the statistics of different clients")
    if trainer.strategy.root_device.type == "mps":
        raise ConfigurationError("Expected a CPU or CUDA device but got mps, which has no float64 to sum in: use --trainer.accelerator cpu")
    if trainer.state.fn == "fit" and trainer.max_steps < 0 and not _stops_otherwise(trainer):
        raise ConfigurationError(NO_ROUNDS)


def _stops_otherwise(trainer: Trainer) -> bool:
    """Whether a limit on batches and epochs, or on time, ends a run whose number of rounds is not set."""
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return timed or (trainer.limit_train_batches != 1.0 and (trainer.max_epochs or -1) > 0)


def fingerprint(module: FederatedRun) -> dict[str, str]:
    """Return what must be equal for a run to go on from a checkpoint, in words that an error can show; made once a set-up.

    What may change and is honoured from then on: how many rounds, `min_clients`, `max_attempts`, engine, threads, precision, callbacks such
    as CodecRefresh, metrics and loggers.
    """
    module.settings = module.settings or {
        "network (parameter names and shapes)": module.layout.fingerprint,
        "codec": json.dumps(module.codec.config(), sort_keys=True),
        "data and partition": module.data.fingerprint(),
        "client sampler": describe(module.data.sampler),
        "augmentation": describe(module.data.augmentation),
        "loss": loss_settings(module.loss),
        "network": network_settings(module.network),
        "algorithm": describe(module.algorithm),
        "availability": describe(module.availability),
        "server optimizer": optimizer_settings(module.server_optimizer(trainable(module.network))),
        "server schedule": describe(module.server_scheduler),
        "weighting": module.weighting,
        "downlink": type(module.downlink).__name__,
        "aggregator": module.aggregator.describe(),
        "batch_norm": module.batch_norm,
        "privacy": json.dumps(module.privacy.settings() if module.privacy else None),
        "seed": str(module.seed),
    }
    return module.settings


LOCAL = ("network", "algorithm", "loss", "augmentation", "weighting", "batch_norm", "privacy")
"""What of a run's fingerprint a client's update and code go by, beside the model, the encoder and what is announced."""


def local_settings(module: FederatedRun) -> str:
    """Return the settings of local training and clipping as text, which clients under secure aggregation must agree on."""
    settings = fingerprint(module)
    return json.dumps({name: settings[name] for name in LOCAL})


def optimizer_settings(optimizer: torch.optim.Optimizer) -> str:
    """Return class and settings of an optimizer as text, however it was made."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return f"{name_of(type(optimizer))}({describe(groups)})"


def loss_settings(loss: nn.Module) -> str:
    """Return a loss as text, with the numbers and names among its attributes, which its own text may leave out."""
    plain = {name: value for name, value in vars(loss).items() if isinstance(value, (bool, int, float, str))}
    plain.pop("training", None)  # a checkpoint of a validated round is saved in evaluation mode
    return f"{describe_network(loss)}{describe(plain)}"


def network_settings(network: nn.Module) -> str:
    """Return a network as text, and the hyperparameters that it saved, such as its learning rate, which its layers do not show."""
    # Parts of the network that were saved along with them are in its text already, and have weights.
    saved = {name: value for name, value in getattr(network, "hparams", {}).items() if not isinstance(value, nn.Module)}
    return f"{describe_network(network)}{describe(saved) if saved else ''}"


STATE = frozenset(("fingerprint", "codec", "server", "privacy", "engine", "codec_error", "pretrain_seconds", "train_seconds"))
"""What a checkpoint has of a federated run."""

CLIENTS_STATE = frozenset(("clients", "held", "connection", "downlink", "settled", "cohort_seed"))
"""What its file of clients has."""


def run_state(module: FederatedRun) -> dict[str, Any]:
    """Return the state of a run, but for its clients', as plain data and tensors."""
    return {
        "fingerprint": dict(fingerprint(module)),
        "codec": codec_state(module.codec) if module.codec.bound else None,
        "server": _without(module.server_state.state_dict(), "settled"),
        "privacy": _without(module.privacy.state_dict(), "cohort_seed") if module.privacy else None,
        "engine": module.engine.chosen if isinstance(module.engine, Auto) else type(module.engine).__name__,
        "codec_error": module.codec_error,
        "pretrain_seconds": module.pretrain_seconds,
        "train_seconds": module.seconds_trained(),
    }


def clients_state(module: FederatedRun) -> dict[str, Any]:
    """Return what a run knows of single clients: what they keep and hold, who took part, and what cohorts are drawn from in secret."""
    return {
        "clients": module.store.state_dict(),
        "held": module.held.state_dict(),
        "connection": module.clients.state_dict() if module.clients else {},
        "downlink": module.downlink.state_dict(),
        "settled": dict(module.server_state.settled),
        "cohort_seed": module.privacy.cohort_seed if module.privacy else None,
    }


def _without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def restore_run(module: FederatedRun, checkpoint: dict[str, Any]) -> None:
    """Take over what ``run_state`` and ``clients_state`` returned; raises ``ConfigurationError`` if it is of another configuration."""
    state = checkpoint.get(RUN)
    if not isinstance(state, dict):
        raise ConfigurationError("Expected a checkpoint of a FederatedModule but this one holds no federated state")
    trainer = getattr(module, "_trainer", None)
    fitting = trainer is not None and trainer.state.fn == "fit"
    clients = checkpoint.get(CLIENTS)
    try:
        missing = sorted({"state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"} - checkpoint.keys())
        missing += sorted(STATE - state.keys()) + sorted({"fit_loop"} - checkpoint.get("loops", {"fit_loop": {}}).keys())
        missing += sorted(CLIENTS_STATE - clients.keys()) if clients is not None else []
        require(not missing, _lacks(", ".join(missing)))
        if fitting:
            _check_settings(module, state)
        require(
            clients is not None or not _needs_clients(module, fitting),
            f"Expected {state.get(CLIENTS_FILE)} beside the checkpoint, with what clients keep, but there is no such file: copy it from "
            "where the checkpoint was written, or start a new run",
        )
        _take_over(module, state, clients, fitting)
    except KeyError as error:
        raise ConfigurationError(_lacks(str(error))) from error


def _check_settings(module: FederatedRun, state: dict[str, Any]) -> None:
    now = fingerprint(module)
    different = [name for name, value in now.items() if state["fingerprint"].get(name) != value]
    if different:
        raise ConfigurationError(
            f"Expected a checkpoint of this configuration but it differs in: {', '.join(different)}. Resume with the config.yaml "
            "beside the checkpoint, or start a new run without `--ckpt_path`"
        )
    if module.privacy and not (state["privacy"] or {}).get("ledger"):
        raise ConfigurationError(
            "Expected a checkpoint with the ledger of its privacy but it has none, so that nobody knows what was released before: go "
            "on from another checkpoint, or start a new run"
        )


def _needs_clients(module: FederatedRun, fitting: bool) -> bool:
    """Whether what clients keep matters: to go on, or to evaluate models of their own."""
    own = module.batch_norm == "local" or module.algorithm.client_state
    return fitting or (own and getattr(module, "_trainer", None) is not None and bool(module.data.client_holdout))


def _lacks(what: str) -> str:
    return f"Expected a whole checkpoint but it lacks {what}: choose another from the run's checkpoints/"


def _take_over(module: FederatedRun, state: dict[str, Any], clients: dict[str, Any] | None, fitting: bool) -> None:
    settled, cohort_seed = ({}, None) if clients is None else (clients["settled"], clients["cohort_seed"])
    if state["codec"] is not None and fitting:
        restore_codec(module.codec, state["codec"])
    if isinstance(module.engine, Auto) and fitting:
        module.engine.take(state["engine"])
    module.server_state.load_state_dict({**state["server"], "settled": settled})
    if clients is not None:
        if fitting:
            module.downlink.load_state_dict(clients["downlink"])
            module.held.load_state_dict(clients["held"])
            if module.clients:
                module.clients.load_state_dict(clients["connection"])
        module.store.load_state_dict(clients["clients"])
    if module.privacy and state["privacy"]:
        module.privacy.load_state_dict({**state["privacy"], "cohort_seed": cohort_seed})
    module.codec_error = state["codec_error"]
    module.pretrain_seconds = state["pretrain_seconds"]
    module.train_seconds = state["train_seconds"]
