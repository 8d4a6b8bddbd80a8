from __future__ import annotations

import pickle

import pytest
import torch

from fedlight.core.errors import ConfigurationError
from fedlight.metrics import ClientSpread, spread


def batch(samples: int, clients: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, targets = torch.randint(0, 3, (2, samples), generator=generator)
    return predicted, targets, torch.randint(0, clients, (samples,), generator=generator)


def test_counts_each_client() -> None:
    metric = ClientSpread(num_clients=7)
    predicted, targets, clients = batch(200, 7, seed=0)
    metric.update(predicted, targets, clients)
    for client in range(7):
        mine = clients == client
        assert metric.total[client] == mine.sum()
        assert metric.correct[client] == (predicted[mine] == targets[mine]).sum()
    assert metric.compute() == spread(metric.correct, metric.total)


def test_merge_of_two_halves_is_the_whole() -> None:
    whole, first, second = (ClientSpread(num_clients=6) for _ in range(3))
    first.update(*batch(50, 6, seed=1))
    second.update(*batch(70, 6, seed=2))
    whole.update(*batch(50, 6, seed=1))
    whole.update(*batch(70, 6, seed=2))
    first.merge_state(second)
    assert first.compute() == whole.compute()


def test_reset_state_dict_and_pickle() -> None:
    metric = ClientSpread(num_clients=4)
    metric.update(*batch(30, 4, seed=3))
    value = metric.compute()
    assert pickle.loads(pickle.dumps(metric)).compute() == value
    metric.persistent(True)
    other = ClientSpread(num_clients=4)
    other.load_state_dict(metric.state_dict())
    assert other.correct.equal(metric.correct)
    metric.reset()
    assert metric.total.sum() == 0


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = ClientSpread(num_clients=2)
    one = torch.ones(2, dtype=torch.int64)
    clients = torch.tensor([0, 1])
    assert metric(one, one, clients)["mean"] == 1.0
    assert metric(one, 0 * one, clients)["mean"] == 0.0
    assert metric.compute()["mean"] == 0.5


def test_bad_input_is_refused_before_anything_is_counted() -> None:
    metric = ClientSpread(num_clients=2)
    label = torch.zeros(1, dtype=torch.int64)
    for client in (-1, 2):
        with pytest.raises(ConfigurationError, match="num_clients"):
            metric.update(label, label, torch.tensor([client]))
    with pytest.raises(ConfigurationError, match="one shape"):
        metric.update(label, label, torch.tensor([0, 1]))
    assert metric.total.sum() == 0
    with pytest.raises(ConfigurationError, match="num_clients"):
        ClientSpread(num_clients=0)
    with pytest.raises(ConfigurationError, match="worst"):
        ClientSpread(num_clients=1, worst=1.5)
