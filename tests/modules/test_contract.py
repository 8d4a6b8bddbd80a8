"""Every name that Lightning gives a user to override, read or set is in one list of the contract."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

from fedlight.clients import ClientOptimizer, FedAvg
from fedlight.core.errors import ConfigurationError
from fedlight.modules import contract

CLIENT = (
    *("training_step", "forward", "configure_optimizers", "on_train_batch_start", "on_train_batch_end"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
)
"""Called in a client's training, in the Trainer's order; a pass over a client's samples is an epoch, or a round
of a number of steps."""

SERVER = (
    *("prepare_data", "setup", "teardown", "configure_model", "configure_callbacks", "on_fit_start"),
    *("validation_step", "test_step", "predict_step"),
    *("on_validation_epoch_end", "on_test_epoch_end", "val_dataloader", "test_dataloader", "predict_dataloader"),
    *("train_dataloader", "on_save_checkpoint", "on_load_checkpoint", "state_dict", "load_state_dict", "strict_loading"),
    *("prepare_data_per_node", "example_input_array", "on_exception"),
)
"""Called or read once, on the server, as the Trainer does."""

YOURS = (
    *("log", "log_dict", "print", "all_gather", "optimizers", "lr_schedulers", "trainer", "current_epoch", "global_step", "global_rank"),
    *("local_rank", "logger", "loggers", "device", "dtype", "on_gpu", "device_mesh", "fabric", "hparams", "hparams_initial"),
    *("save_hyperparameters", "remove_ignored_hparams", "freeze", "unfreeze", "to_onnx", "to_torchscript", "to_tensorrt"),
    *("load_from_checkpoint", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "toggled_optimizer", "clip_gradients"),
    *("CHECKPOINT_HYPER_PARAMS_KEY", "CHECKPOINT_HYPER_PARAMS_NAME", "CHECKPOINT_HYPER_PARAMS_TYPE", "from_datasets", "name"),
    "allow_zero_length_dataloader_with_multiple_devices",
)
"""For the user's own code to call, read or set. On a client the Trainer is the client's (`fedlight.modules.views`)."""

LOADER_USED = ("dataset", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last")
"""What of the training loader clients go by; a sampler that cannot be split over clients is refused (`fedlight.data.samples`)."""

LOADER_SPEED = (
    *("num_workers", "pin_memory", "timeout", "multiprocessing_context", "prefetch_factor", "persistent_workers"),
    *("pin_memory_device", "in_order"),
)
"""Of the training loader, and for its speed alone: clients' items are read in the process that trains them."""

LISTS = {
    "called on clients": CLIENT,
    "called on the server": SERVER,
    "passed on": contract.FORWARDED,
    "passed by batches": contract.TRANSFER,
    "refused": contract.REFUSED,
    "different": contract.DIFFERENT,
    "the user's": YOURS,
}
LOADER = {"used": LOADER_USED, "different": contract.LOADER_DIFFERENT, "for speed": LOADER_SPEED}
OF_TORCH = ("state_dict", "load_state_dict", "forward")  # of nn.Module's own names, those that Lightning calls on a module


def overridable(kind: type, base: type) -> set[str]:
    """Return the public names of a class, and of what its instances are given, that are not of ``base``."""
    names = {*dir(kind), *vars(kind())} - {*dir(base), *(vars(base()) if base is not object else ())}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(("kind", "base"), [(LightningModule, nn.Module), (LightningDataModule, object)])
def test_every_name_of_lightning_is_in_a_list(kind, base):
    listed = {name for names in LISTS.values() for name in names}
    assert not overridable(kind, base) - listed


def test_every_setting_of_a_loader_is_in_a_list():
    settings = {*inspect.signature(DataLoader.__init__).parameters} - {"self"}
    assert settings == {name for names in LOADER.values() for name in names}


@pytest.mark.parametrize("lists", [LISTS, LOADER], ids=["modules", "loaders"])
def test_no_name_is_in_two_lists_and_none_is_made_up(lists):
    names = [name for found in lists.values() for name in found]
    assert len(names) == len({*names})
    real = {*dir(LightningModule), *vars(LightningModule()), *dir(LightningDataModule), *vars(LightningDataModule()), *OF_TORCH}
    real |= {*inspect.signature(DataLoader.__init__).parameters}
    assert {*names} <= real


@pytest.mark.parametrize("hook", [name for name in contract.REFUSED if name != "automatic_optimization"])
def test_what_is_refused_names_the_hook_and_the_way_out(hook):
    own = type("Own", (BoringModel,), {hook: lambda self, *_: None})()
    with pytest.raises(ConfigurationError, match=f"Own overrides `{hook}`.*remove it, and "):
        contract.check_contract(own, ClientOptimizer(steps=1))


def test_a_step_that_takes_the_loader_is_refused():
    own = type("Own", (BoringModel,), {"training_step": lambda self, dataloader_iter: None})()
    with pytest.raises(ConfigurationError, match="that of Own takes `dataloader_iter`"):
        contract.check_contract(own, ClientOptimizer(steps=1))


@pytest.mark.parametrize("hook", contract.WITH_OPTIMIZER)
def test_hooks_that_are_given_the_optimizer_need_one(hook):
    own = type("Own", (BoringModel,), {hook: lambda self, optimizer: None})()
    contract.check_contract(own, ClientOptimizer(steps=1))
    with pytest.raises(ConfigurationError, match=f"to give to `{hook}` of Own, but got FedAvg"):
        contract.check_contract(own, FedAvg(steps=1))


def test_what_is_different_is_said_where_it_is_used_and_nowhere_else():
    own = type("Own", (BoringModel,), {"on_train_start": lambda self: None})()
    data = torch.utils.data.TensorDataset(torch.zeros(8, 32))
    loader = DataLoader(data, batch_size=4, generator=torch.Generator())
    told = contract.differences(own, ClientOptimizer(steps=1, batch_size=2), loader)
    assert [clause.partition("`")[2].partition("`")[0] for clause in told] == ["on_train_start", "batch_size", "generator"]
    assert contract.differences(BoringModel(), ClientOptimizer(steps=1, batch_size=4), DataLoader(data, batch_size=4)) == []
