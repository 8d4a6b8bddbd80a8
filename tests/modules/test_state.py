"""What a run is told by: settings that look alike are alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

import fedlight
from fedlight.clients import ClientOptimizer
from fedlight.clients.algorithms import Algorithm
from fedlight.core.fingerprint import describe
from fedlight.modules import state
from fedlight.modules.state import loss_settings, network_settings
from tests.integration.test_own_module import fit
from tests.own import LitClassifier, Points


def parsed(optimizer: str, lr: float) -> Algorithm:
    """Return local training as the command line makes it of text."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Algorithm, "algorithm")
    local = {"optimizer": {"class_path": f"torch.optim.{optimizer}", "init_args": {"lr": lr}}, "steps": 1}
    given = parser.parse_object({"algorithm": {"class_path": "fedlight.clients.ClientOptimizer", "init_args": local}})
    return parser.instantiate(given).algorithm


class Maker:
    """Makes objects, as the command line's instantiator does, and holds what must not be in a text."""

    def __init__(self) -> None:
        self.owner = [object()]

    def __call__(self, made, *args, **kwargs):
        return made(*args, **kwargs)


def one(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def other(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


MAKERS = [
    lambda: ClientOptimizer(one, steps=1),
    lambda: ClientOptimizer(other, steps=1),
    lambda: ClientOptimizer(partial(torch.optim.SGD, lr=1.0), steps=1),
    lambda: ClientOptimizer(partial(torch.optim.SGD, lr=0.5), steps=1),
    lambda: ClientOptimizer(partial(torch.optim.Adam, lr=0.5, betas=(0.8, 0.9)), steps=1),
    lambda: parsed("SGD", 1.0),
    lambda: parsed("SGD", 0.5),
    lambda: parsed("Adam", 0.5),
]


def test_optimizers_of_clients_are_told_apart_and_nothing_else_is():
    texts = [describe(make()) for make in MAKERS]
    assert texts == [describe(make()) for make in MAKERS] and len(set(texts)) == len(texts)
    assert not any(" at 0x" in text for text in texts)


@pytest.mark.parametrize("part", [{"a": [one, 1]}, ("x", partial(one)), partial(Maker(), one), len, torch.optim.SGD])
def test_functions_within_lists_and_mappings_go_by_their_names(part):
    assert " at 0x" not in describe(part)


def test_a_networks_hyperparameters_are_settings():
    assert network_settings(LitClassifier(lr=0.1)) != network_settings(LitClassifier(lr=0.2))
    assert network_settings(LitClassifier(lr=0.1)) == network_settings(LitClassifier(lr=0.1))


def test_a_loss_is_the_same_in_training_and_in_evaluation():
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert loss_settings(loss.train()) == loss_settings(loss.eval()) != loss_settings(torch.nn.CrossEntropyLoss())


def test_settings_are_put_into_words_once_a_fit_however_many_checkpoints_it_saves(monkeypatch, tmp_path):
    made, saver = [], ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    monkeypatch.setattr(state, "describe_network", lambda network: made.append(network) or "")
    fit(fedlight.federate(LitClassifier(), Points(), num_clients=2), rounds=3, callbacks=[saver], enable_checkpointing=True)
    assert len(made) == 2 and len([*tmp_path.iterdir()]) >= 3  # of the network and of the loss
