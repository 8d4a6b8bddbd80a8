"""What a whole run counts, drops and logs (laws 6, 7 and 9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedlight.callbacks import FederatedCallback
from fedlight.clients import FedAvg
from fedlight.core.errors import RoundFailedError
from fedlight.core.export import encoder_file
from fedlight.core.layout import float_buffers
from fedlight.core.packing import pack
from fedlight.data import Uniform
from tests.federation import Blobs, Fixed, History, Spy, federated, federated_data, learned, mlp, pretraining, run, trainer, weights_of
from tests.integration.carried import Carried


def logged(module: Any, rounds: int = 3, **changes: Any) -> tuple[History, Spy]:
    history = History()
    return history, run(module, rounds, logger=history, **changes)


# -- law 6 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["equal", "samples"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "BatchNorm"])
@pytest.mark.parametrize("make", [lambda: None, learned], ids=["identity", "learned"])
def test_uplink_is_the_length_of_what_was_sent(make, norm, weighting):
    """Message with its header, buffers, and the weight where clients' weights differ."""
    module = federated(mlp(norm=norm), codec=make(), weighting=weighting)
    history, spy = logged(module)
    assert history.rounds("bytes/uplink_round") == spy.sizes
    running = [sum(spy.sizes[number] for number in range(last + 1)) for last in range(3)]
    assert list(history.rounds("bytes/uplink").values()) == running
    traffic = module.server_state.traffic
    assert traffic.uplink == running[-1]
    assert traffic.messages == 24
    assert traffic.ratio(module.layout.dim) == 4 * module.layout.dim / (running[-1] / 24)
    (size,) = {len(reply.payload) for reply in spy.replies.values()}
    assert size > module.codec.encoder.format.length * (module.codec.encoder.format.bits or 32) / 8, "a message without a header"


@pytest.mark.quick(3)
@pytest.mark.parametrize("weighting", ["equal", "samples"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "BatchNorm"])
@pytest.mark.parametrize("make", [lambda: None, learned], ids=["identity", "learned"])
def test_what_is_counted_is_what_a_wire_carries(make, norm, weighting):
    """The same run by way of bytes ends with the same model and the same counts, and the counts are what passed."""
    wire, plain = Carried(), federated(mlp(norm=norm), codec=make(), weighting=weighting)
    carried = federated(mlp(norm=norm), codec=make(), weighting=weighting, clients=wire)
    run(plain, 3)
    run(carried, 3)
    assert torch.equal(weights_of(plain), weights_of(carried))
    traffic = carried.server_state.traffic
    assert traffic == plain.server_state.traffic
    assert traffic.uplink == sum(wire.up.values()) and traffic.downlink == sum(wire.down.values())


@pytest.mark.parametrize("norm", [False, True], ids=["", "BatchNorm"])
def test_downlink_is_the_model_and_the_announcements_and_each_encoder_once(norm):
    wire = Carried()
    module = federated(mlp(norm=norm), codec=learned(), clients=wire)
    spy = run(module, 5, data=federated_data(sampler=Uniform(3)))
    assert all("gain" in str(broadcast) for broadcast in spy.broadcast.values())
    model = 4 * (module.layout.dim + sum(b.numel() for b in float_buffers(module.network)))
    met = {client for clients in spy.clients.values() for client in clients}
    assert 3 < len(met) <= 8 and len(wire.down) == 15
    encoder, traffic = len(encoder_file(module.codec)), module.server_state.traffic
    assert traffic.codec == len(met) * encoder
    assert traffic.downlink == sum(wire.down.values())
    holding: set[int] = set()
    for (number, *_, client), size in wire.down.items():
        rest = size - model - (0 if client in holding else encoder)
        told = len(pack(spy.broadcast[number]))
        assert told < rest < told + 100, "the broadcast and two headers are left"
        holding.add(client)
    assert {client for client in range(8) if module.downlink.versions.get(client)} == met


def test_a_codec_without_tensors_is_not_downloaded():
    wire = Carried()
    module = federated(clients=wire)
    run(module, 2)
    assert module.server_state.traffic.codec == 0
    assert module.server_state.traffic.downlink == sum(wire.down.values())
    assert all(0 < size - 4 * module.layout.dim < 100 for size in wire.down.values())


class NextVersion(FederatedCallback):
    """Gives the codec another version after the first round."""

    def on_round_end(self, trainer, pl_module, round):
        if round.context.round == 0:
            pl_module.codec.version += 1
            pl_module.codec.update_digest()


def test_a_new_encoder_version_is_downloaded_again():
    module = federated(codec=learned())
    run(module, 3, callbacks=[NextVersion()])
    assert module.server_state.traffic.codec == pytest.approx(2 * 8 * len(encoder_file(module.codec)), rel=0.01)


def test_a_second_fit_begins_a_run_of_its_own():
    """Nobody has downloaded anything, and nothing of the first run is counted."""
    module = federated(codec=learned())
    run(module, 2)
    once = module.server_state.traffic.codec, module.server_state.traffic.messages
    run(module, 2)
    assert (module.server_state.traffic.codec, module.server_state.traffic.messages) == once
    assert module.server_state.rounds == 2


# -- law 7 -------------------------------------------------------------------------------------------------------------


def poisoned(*clients: int, value: float = float("nan")):
    data = federated_data()
    data.setup()
    for client in clients:
        data.x[torch.from_numpy(data.train_partition[client])] = value
    return data


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda: None, learned], ids=["identity", "learned"])
def test_a_client_with_bad_data_is_dropped_named_and_counted(make, value, caplog):
    module = federated(codec=make())
    history, spy = logged(module, 2, data=poisoned(3, 6, value=value))
    assert list(history.rounds("round/dropped").values()) == [2, 2]
    assert list(history.rounds("round/clients").values()) == [6, 6]
    assert spy.clients[0] == [0, 1, 2, 4, 5, 7]
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("client 3 was dropped" in message for message in messages)
    assert any("client 6 was dropped" in message for message in messages)
    assert torch.isfinite(weights_of(module)).all()
    assert module.server_state.traffic.messages == 12


def test_a_dropped_client_changes_nothing_for_the_others():
    """The round is the one that the remaining clients would have made alone."""
    with_bad, without = federated(), federated()
    run(with_bad, 1, data=poisoned(3))
    run(without, 1, data=federated_data(sampler=Fixed([0, 1, 2, 4, 5, 6, 7])))
    assert torch.equal(weights_of(with_bad), weights_of(without))


def test_a_cohort_lost_as_a_whole_is_an_error_that_says_why():
    module = federated(max_attempts=2)
    start = weights_of(module)
    sentence = r"Round 0 had no usable aggregate.*2 attempts.*client 0: .*before it has taken a step.*look for NaN or Inf"
    with pytest.raises(RoundFailedError, match=sentence):
        run(module, 1, data=poisoned(*range(8)))
    assert torch.equal(weights_of(module), start)


def test_a_learning_rate_that_diverges_is_an_error_that_says_why():
    with pytest.raises(RoundFailedError, match="lower the client learning rate"):
        run(federated(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), algorithm=FedAvg(lr=1e38, steps=5, batch_size=8)), 1)


# -- law 9 -------------------------------------------------------------------------------------------------------------


def test_what_only_a_simulation_sees_is_logged_as_often_as_asked_and_changes_nothing():
    ends = {}
    for every in (0, 1, 2):
        module = federated(codec=learned(), sim_every=every)
        history, _ = logged(module, 5)
        expected = [number for number in range(5) if every and number % every == 0]
        assert list(history.rounds("sim/relative_error")) == list(history.rounds("sim/cosine")) == expected
        ends[every] = weights_of(module)
        if every == 0:
            names = {name for metrics in history.steps.values() for name in metrics if name.startswith("sim/")}
            assert names <= {"sim/loss"}
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_an_update_sent_in_full_has_no_error():
    history, _ = logged(federated(sim_every=1), 2)
    assert max(history.rounds("sim/relative_error").values()) < 1e-6
    assert min(history.rounds("sim/cosine").values()) > 1 - 1e-6


def test_only_sim_figures_tell_of_single_clients():
    """Every other figure can be computed from the sum of codes, counts and bytes."""
    history, _ = logged(federated(codec=learned(), sim_every=1), 1)
    server = {name for metrics in history.steps.values() for name in metrics} - {"epoch"}
    server = {name for name in server if not name.startswith(("sim/", "bytes/", "pretrain/"))}
    assert server == {"round/clients", "round/absent", "round/dropped", "round/attempts", "round/aggregate_norm"}


def test_a_run_learns():
    module = federated(codec=learned(), algorithm=FedAvg(lr=0.3, steps=5, batch_size=16))
    data = federated_data(source=Blobs(400))
    runner = trainer(15, callbacks=[pretraining()])
    runner.fit(module, datamodule=data)
    assert runner.test(module, datamodule=data, verbose=False)[0]["test/accuracy"] > 0.6
