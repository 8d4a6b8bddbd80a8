from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlight.clients import FedAvg, FedNova, FedSGD, LocalModel, proxy, record_bank
from fedlight.clients.proxy import draw_client
from fedlight.core.bank import UpdateBank, write_bank
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import flatten

Data = tuple[Tensor, Tensor]


@given(st.integers(1, 80), st.integers(1, 60), st.floats(0.05, 50), st.integers(0, 1000))
def test_a_drawn_client_has_distinct_samples_of_the_data(n: int, samples: int, alpha: float, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(4, size=n)
    chosen = draw_client(labels, 4, samples, alpha, np.random.default_rng(seed))
    assert 1 <= len(chosen) <= samples and len(set(chosen.tolist())) == len(chosen)
    assert chosen.min() >= 0 and chosen.max() < n


def test_alpha_sets_how_skewed_clients_are() -> None:
    labels, rng = np.repeat(np.arange(5), 400), np.random.default_rng(0)

    def largest_share(alpha: float) -> float:
        counts = [np.bincount(labels[draw_client(labels, 5, 200, alpha, rng)], minlength=5) for _ in range(100)]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.1) > 0.7 > largest_share(1.0) > 0.35 > largest_share(1000) > 0.2


def test_a_client_of_absent_classes_takes_any_samples() -> None:
    labels = np.zeros(10, dtype=int)
    sizes = [len(draw_client(labels, 1000, 4, 0.01, np.random.default_rng(seed))) for seed in range(20)]
    assert set(sizes) == {4}


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def record(model: LocalModel, data: Data, **arguments: object) -> UpdateBank:
    settings = {"algorithm": FedSGD(), "num_classes": 3, "rounds": 3, "clients": 2, "samples": 6, "alpha": 1.0, "seed": 0}
    return record_bank(model, model.start.clone(), model.buffers.clone(), proxy=data, **(settings | arguments))


def test_the_bank_has_the_models_layout_and_the_asked_size(model: LocalModel, data: Data) -> None:
    bank = record(model, data)
    assert bank.updates.shape == (3, 2, len(model.weights)) and bank.layout == model.flat.layout
    assert bank.updates.abs().sum(-1).all()


def test_the_bank_depends_on_its_seed_and_first_round_alone(network: nn.Module, data: Data) -> None:
    dropout = nn.Sequential(network, nn.Dropout(0.5))
    algorithm = FedAvg(lr=0.1, batch_size=2, epochs=1)

    def updates(noise: int = 0, **arguments: int) -> Tensor:
        local = LocalModel(dropout, cross_entropy)
        local.load(local.weights.clone(), local.buffers)
        torch.manual_seed(noise)
        return record(local, data, algorithm=algorithm, **arguments).updates

    assert torch.equal(updates(0), updates(1))
    assert not torch.equal(updates(), updates(seed=1)) and not torch.equal(updates(), updates(first_round=5))


def test_recording_leaves_the_global_generator_and_the_global_weights_alone(model: LocalModel, data: Data) -> None:
    weights, before = model.start.clone(), torch.get_rng_state()
    start = weights.clone()
    record_bank(model, start, model.buffers.clone(), FedSGD(), data, 3, 2, 2, 6, 1.0, 0)
    assert torch.equal(start, weights) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("server_lr", "trajectories", "begins"), [(1.0, 1, [0] * 5), (0.5, 1, [0] * 5), (0.5, 2, [0, 0, 0, 3, 3]), (0.5, 4, [0, 0, 2, 3, 4])]
)
def test_the_bank_follows_training_trajectories(
    server_lr: float, trajectories: int, begins: list[int], model: LocalModel, data: Data
) -> None:
    """Round by round from the weights that the mean updates so far lead to; the next trajectory is again at the first of them."""
    visited: list[Tensor] = []
    numbers: list[int] = []

    class Watched(FedSGD):
        def run(self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator):
            visited.append(model.start.clone())
            numbers.append(round)
            return super().run(model, x, y, round, generator)

    start = model.start.clone()
    bank = record(model, data, algorithm=Watched(), server_lr=server_lr, rounds=5, first_round=7, trajectories=trajectories)
    means = bank.updates.mean(1)
    for round, begin in enumerate(begins):
        expected = start - server_lr * means[begin:round].sum(0)
        for client in range(2):
            torch.testing.assert_close(visited[2 * round + client], expected)
            assert numbers[2 * round + client] == 7 + round - begin
    assert not torch.equal(bank.updates[0], bank.updates[3])


def test_recorded_updates_are_the_algorithms(model: LocalModel, data: Data) -> None:
    """With one class and as many samples as there are, every client holds all the data: its FedSGD update is the gradient."""
    x, y = data[0], torch.zeros_like(data[1])
    gradient = flatten(model.gradients(x, y)[1])
    bank = record(model, (x, y), num_classes=1, samples=len(y))
    torch.testing.assert_close(bank.updates[0], gradient.expand(2, -1), atol=1e-6, rtol=1e-4)


def test_clients_of_past_aggregates_differ_at_the_scale_of_the_update_alone(model: LocalModel, data: Data) -> None:
    """Whatever number goes with an update, such as FedNova's of local steps."""
    dim = len(model.weights)
    aggregate = torch.ones(dim + 1)
    past, recorded = record(model, data, algorithm=FedNova(lr=0.1, steps=3), rounds=1, history=aggregate[None]).updates
    mean = recorded.mean(0)
    expected = (recorded - mean)[:, :dim] * dim**0.5 / mean[:dim].norm()
    torch.testing.assert_close((past - aggregate)[:, :dim], expected, atol=1e-5, rtol=1e-4)


def test_progress_is_reported_after_every_round(model: LocalModel, data: Data) -> None:
    rounds: list[int] = []
    record(model, data, first_round=7, on_round=rounds.append)
    assert rounds == [0, 1, 2]


def test_no_proxy_data_is_refused(model: LocalModel, data: Data) -> None:
    with pytest.raises(ConfigurationError, match=r"proxy data .* empty: raise `data.proxy_samples`"):
        record(model, (data[0][:0], data[1][:0]))


def test_a_trajectory_that_diverges_is_refused(network: nn.Module, data: Data) -> None:
    local = LocalModel(network, lambda model, x, y: model(x).exp().exp().sum() * 1e30)
    local.load(local.weights.clone(), local.buffers)
    with pytest.raises(ConfigurationError, match=r"diverged in round \d: lower the client learning rate"):
        record(local, data, algorithm=FedAvg(lr=10.0, steps=5))


@pytest.mark.parametrize("spare", [-1, 0])
def test_a_bank_too_large_for_memory_is_recorded_to_a_file_that_is_gone(
    spare: int, model: LocalModel, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(proxy, "write_bank", lambda path, *rest: (written.append(path), write_bank(path, *rest)))
    size, start = 4 * 3 * 2 * len(model.weights), model.start.clone()
    bank = record(model, data, in_memory_mb=(size + spare) / 2**20)
    assert len(written) == -spare and all(tmp_path in path.parents for path in written)
    assert not list(tmp_path.iterdir())
    model.load(start, model.buffers.clone())
    assert torch.equal(bank.updates, record(model, data).updates)
    assert torch.equal(torch.stack(list(bank.split(0.5)[1])), bank.updates[1::2])


def test_nothing_is_left_behind_if_recording_to_a_file_fails(
    network: nn.Module, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    local = LocalModel(network, lambda model, x, y: model(x).exp().exp().sum() * 1e30)
    local.load(local.weights.clone(), local.buffers)  # until then `start` is memory as it comes
    with pytest.raises(ConfigurationError, match="diverged"):
        record(local, data, algorithm=FedAvg(lr=10.0, steps=5), in_memory_mb=0)
    assert not list(tmp_path.iterdir())
