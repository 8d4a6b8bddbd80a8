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

LISTS = {
    "called on clients": contract.CLIENT,
    "called on the server": contract.SERVER,
    "passed on": contract.FORWARDED,
    "passed by batches": contract.TRANSFER,
    "refused": contract.REFUSED,
    "different": contract.DIFFERENT,
    "the user's": contract.YOURS,
}
LOADER = {"used": contract.LOADER_USED, "different": contract.LOADER_DIFFERENT, "for speed": contract.LOADER_SPEED}
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
