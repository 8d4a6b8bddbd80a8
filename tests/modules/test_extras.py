"""Buffers of one's own module, and parameters that are not trained, through whole runs."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedlight
from fedlight.aggregation import SecureAggregator
from fedlight.clients import ClientOptimizer, Ditto, FedAvg
from fedlight.codecs import ChainCodec, IdentityCodec, LinearCodec, QSGDCodec, QuantizeCodec
from fedlight.core.errors import ConfigurationError, RoundFailedError
from fedlight.data import Everyone
from fedlight.modules import FederatedModule
from fedlight.rounds import CatchUp, ThroughBytes
from tests.federation import trainer


class Lit(LightningModule):
    """A regression; ``kinds`` says what else it holds."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds = kinds
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.register_buffer("initialised", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("shift", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("table", torch.arange(1000.0), persistent="loose" not in kinds)
        if "teacher" in kinds:
            self.teacher = nn.Linear(4, 6).requires_grad_(False)
        if "norm" in kinds:
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        if "init" in self.kinds and not self.initialised:
            self.shift = -x.double().mean(0)
            self.initialised.fill_(1)
        if "count" in self.kinds:
            self.seen += 1
        if "teacher" in self.kinds:
            for own, other in zip(self.teacher.parameters(), self.net[0].parameters(), strict=True):
                own.data.mul_(0.5).add_(0.5 * other.data)
        if "diverge" in self.kinds:
            self.table[3] = torch.inf
        return nn.functional.mse_loss(self.net(x + self.shift.float()), y)

    def train_dataloader(self):
        x = 2 + torch.randn(120, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=20)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.02)


def fit(own: LightningModule, rounds: int = 3, clients: int = 3, **settings) -> FederatedModule:
    settings = {"algorithm": ClientOptimizer(steps=4, batch_size=20), "sampler": Everyone()} | settings
    module = fedlight.federate(own, num_clients=clients, **settings)
    trainer(rounds, log_every_n_steps=1).fit(module)
    return module


def test_constants_cost_a_byte_and_stay_as_they_are() -> None:
    bare, own = Lit("loose"), Lit()
    uplink = [fit(one, codec=QSGDCodec(4)).server_state.traffic for one in (bare, own)]
    assert uplink[0].uplink == uplink[1].uplink and uplink[0].downlink == uplink[1].downlink
    assert torch.equal(own.table, torch.arange(1000.0)) and own.mask.tolist() == [0, -torch.inf] and own.table.dtype == torch.float32


def test_an_initialisation_by_data_happens_once_a_client_and_its_mean_is_kept() -> None:
    own = Lit("init", "count")
    module = fit(own, rounds=3)
    assert int(own.initialised) == 1 and own.shift.dtype == torch.float64 and int(own.seen) == 12
    means = [module.own_data.client_data(client)[0].dataset.tensors[0].mean(0) for client in range(3)]
    assert (own.shift + torch.stack(means).mean(0)).abs().max() < 0.5  # of the first batches, of half of a client's samples
    assert module.server_state.extras == {"initialised", "shift", "seen"}


def test_one_client_ends_with_the_buffers_of_a_loop_by_hand() -> None:
    own, hand = Lit("init", "count", "teacher", "norm"), Lit("init", "count", "teacher", "norm")
    module = fit(own, rounds=1, clients=1, algorithm=ClientOptimizer(epochs=1, batch_size=120))
    x, _ = module.own_data.client_data(0)
    optimizer = hand.configure_optimizers()
    hand.training_step([tensor[x.rows] for tensor in x.dataset.tensors], 0).backward()
    optimizer.step()
    for name, tensor in hand.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("downlink", [None, CatchUp])
def test_what_travels_as_bytes_is_what_a_simulation_sees(downlink) -> None:
    """Also to a client that missed rounds, and one that holds the initial model alone."""
    kinds, runs = ("init", "count", "teacher", "norm"), []
    for clients in (None, ThroughBytes()):
        own = Lit(*kinds)
        more = {} if downlink is None else {"downlink": downlink()}
        module = fedlight.federate(own, num_clients=6, cohort_size=2, clients=clients, algorithm=ClientOptimizer(steps=3), **more)
        trainer(5).fit(module)
        runs.append((own.state_dict(), vars(module.server_state.traffic)))
    (plain, bytes_plain), (carried, bytes_carried) = runs
    assert all(torch.equal(plain[name], carried[name]) for name in plain) and bytes_plain == bytes_carried
    assert not torch.equal(plain["teacher.weight"], Lit(*kinds).teacher.weight)


def test_a_resumed_run_goes_on_from_what_training_changed(tmp_path) -> None:
    whole = Lit("init", "count", "teacher")
    fit(whole, rounds=4)
    path = tmp_path / "half.ckpt"
    first = trainer(2)
    first.fit(
        fedlight.federate(
            Lit("init", "count", "teacher"), num_clients=3, sampler=Everyone(), algorithm=ClientOptimizer(steps=4, batch_size=20)
        )
    )
    first.save_checkpoint(path)
    own = Lit("init", "count", "teacher")
    module = fedlight.federate(own, num_clients=3, sampler=Everyone(), algorithm=ClientOptimizer(steps=4, batch_size=20))
    trainer(4).fit(module, ckpt_path=path, weights_only=True)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert module.server_state.extras >= {"shift", "teacher.weight"}


def test_a_client_whose_buffer_diverged_is_dropped_by_name() -> None:
    with pytest.raises(RoundFailedError, match="its table is not finite"):
        fit(Lit("diverge"), rounds=1)


def test_what_would_travel_in_the_clear_beside_a_masked_code_is_refused() -> None:
    codec = ChainCodec([LinearCodec(2, "random", block_size=16), QuantizeCodec(8)])
    settings = {"codec": codec, "aggregator": SecureAggregator(3, threshold=2), "proxy_samples": 20}
    fit(Lit(), rounds=1, **settings)
    with pytest.raises(ConfigurationError, match="changes seen.*persistent=False"):
        fit(Lit("count"), rounds=1, **settings)


def test_personal_models_keep_their_buffers_out_of_the_common_ones() -> None:
    counted, personal = Lit("count"), Lit("count")
    fit(counted, algorithm=FedAvg(lr=0.02, steps=4, batch_size=20))
    fit(personal, algorithm=Ditto(lr=0.02, steps=4, batch_size=20))
    assert all(torch.equal(tensor, personal.state_dict()[name]) for name, tensor in counted.state_dict().items())


def test_a_frozen_normalisation_layer_stands_still_and_sends_nothing() -> None:
    own = Lit("norm")
    own.net[1].eval()
    own.net.append(nn.BatchNorm1d(1))
    fit(own, codec=IdentityCodec())
    assert own.net[3].running_mean.any() and int(own.net[3].num_batches_tracked) == 12
    assert not own.net[1].running_mean.any() and int(own.net[1].num_batches_tracked) == 0


class Late(Lit):
    """Makes its teacher when training starts, and moves it after every step."""

    def on_train_start(self) -> None:
        self.mean = nn.Linear(4, 6).requires_grad_(False)
        self.mean.load_state_dict(self.net[0].state_dict())

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        for own, other in zip(self.mean.parameters(), self.net[0].parameters(), strict=True):
            own.data.lerp_(other.data, 0.5)


@pytest.mark.parametrize("carrier", [None, ThroughBytes])
def test_what_is_made_when_training_starts_travels_too(carrier) -> None:
    own = Late()
    first = own.net[0].weight.detach().clone()
    settings = {"algorithm": ClientOptimizer(steps=4, batch_size=20), "clients": None if carrier is None else carrier()}
    module = fedlight.federate(own, num_clients=2, sampler=Everyone(), **settings)
    trainer(2).fit(module)
    assert module.server_state.extras == {"mean.weight", "mean.bias"}
    assert not torch.equal(own.mean.weight, first) and (own.mean.weight - own.net[0].weight).norm() < (first - own.net[0].weight).norm()
