"""One client's federated training of modules that everybody knows ends where Lightning's own Trainer ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import fedlight
from fedlight.clients import ClientOptimizer
from fedlight.core.errors import ConfigurationError
from tests.integration.test_own_loop import QUIET
from tests.integration.test_own_module import fit
from tests.known_modules import BATCH, KNOWN, Gan, ResNet


class InRounds(Callback):
    """What a round with one client is beside an epoch: a new optimizer, and weights that arrive as their difference from the start."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers[0].state.clear()
        self.start = [parameter.detach().clone() for parameter in pl_module.parameters() if parameter.requires_grad]

    def on_train_epoch_end(self, trainer, pl_module):
        for parameter, start in zip((p for p in pl_module.parameters() if p.requires_grad), self.start, strict=True):
            parameter.data = start - (start - parameter.data)


def plainly(own: LightningModule, data=None, epochs: int = 3, callbacks: Sequence[Callback] = ()) -> LightningModule:
    torch.manual_seed(0)
    Trainer(**QUIET, max_epochs=epochs, limit_val_batches=0, callbacks=[*callbacks]).fit(own, data)
    return own


def federated(own: LightningModule, data=None, rounds: int = 3, batch_size: int = BATCH) -> LightningModule:
    algorithm = ClientOptimizer(batch_size=batch_size, epochs=1)
    fit(fedlight.federate(own, data, num_clients=1, algorithm=algorithm), rounds=rounds, limit_val_batches=0)
    return own


KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind is ResNet else ()) for kind in KNOWN]


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_is_an_epoch_to_rounding(kind):
    plain, own = plainly(kind(), epochs=1).state_dict(), federated(kind(), rounds=1).state_dict()
    for name, tensor in plain.items():
        apart = (own[name].double() - tensor.double()).abs().max() / tensor.double().abs().max().clamp(min=1e-3)
        assert apart < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_ends_where_the_trainer_ends_bit_for_bit(kind):
    plain, own, before = plainly(kind(), callbacks=[InRounds()]).state_dict(), federated(kind()).state_dict(), kind().state_dict()
    different = [name for name, tensor in plain.items() if not torch.equal(tensor, own[name])]
    assert not different and len(plain) == len(own)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in plain.items())


def test_lightnings_own_data_module_and_module_in_batches_of_one():
    torch.manual_seed(0)
    plain, own, data = BoringModel(), BoringModel(), BoringDataModule()
    own.load_state_dict(plain.state_dict())
    plainly(plain, data, callbacks=[InRounds()])
    federated(own, data, batch_size=1)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_networks_against_each_other_are_refused_with_the_way_out():
    with pytest.raises(ConfigurationError, match="automatic optimization but Gan steps its optimizers by itself: return the loss.*or fed"):
        federated(Gan())
