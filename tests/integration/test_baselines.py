"""The baseline codecs in whole runs: what clients send is what a round without Lightning sends, resumed, over processes, counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedlight.callbacks import FederatedCallback
from fedlight.codecs import ChainCodec, CountSketchCodec, HalfCodec, LinearCodec, PowerSGDCodec, QSGDCodec, TopKCodec
from fedlight.core.codec import Codec, Context, State
from fedlight.core.packing import pack
from fedlight.core.simulate import simulate_round
from fedlight.data import Uniform
from tests.federation import History, federated, federated_data, pretraining, run, run_folders, trainer, weights_of
from tests.integration.carried import Carried

BASELINES: dict[str, Callable[[], Codec]] = {
    "half": HalfCodec,
    "qsgd": lambda: QSGDCodec(4, 32),
    "top-k": lambda: TopKCodec(8),
    "fresh projection": lambda: LinearCodec(4, "random", block_size=16, fresh=True),
    "count sketch": lambda: CountSketchCodec(2, 3, momentum=0.5),
    "power sgd": lambda: PowerSGDCodec(1),
    "projection and top-k": lambda: ChainCodec([LinearCodec(2, "random", block_size=16), TopKCodec(2)]),
}
baselines = pytest.mark.parametrize("make", BASELINES.values(), ids=BASELINES)


class Wire(FederatedCallback):
    """Remembers the length of every message and what every pass announces."""

    def __init__(self) -> None:
        self.messages: dict[tuple[int, int], list[int]] = {}
        self.broadcast: dict[tuple[int, int], dict[str, Any]] = {}

    def on_client_message(self, trainer, pl_module, round, reply):
        key = round.context.round, round.context.step
        self.messages.setdefault(key, []).append(len(reply.payload))
        self.broadcast[key] = dict(round.context.broadcast)


@baselines
def test_a_run_sends_and_decodes_what_a_simulated_round_does(make):
    module = federated(codec=make())
    spy = run(module, 3)
    server: State = {}
    clients: list[State] = [{} for _ in range(8)]
    for number in range(3):
        updates = torch.stack([spy.replies[number, 0, client].simulation.update for client in range(8)])
        context = Context(module.seed, number)
        assert torch.equal(simulate_round(module.codec, updates, None, context, server, clients), spy.aggregates[number])


@baselines
def test_bytes_of_every_pass_and_every_announcement_are_counted(make):
    carried, wire, history = Carried(), Wire(), History()
    module = federated(codec=make(), clients=carried)
    run(module, 3, callbacks=[wire], logger=history)
    model, traffic = 4 * module.layout.dim, module.server_state.traffic
    assert traffic.uplink == sum(sum(lengths) for lengths in wire.messages.values()) == sum(carried.up.values())
    assert traffic.downlink == sum(carried.down.values())
    assert traffic.messages == 24 and traffic.codec == 0
    for (number, step), lengths in wire.messages.items():
        assert set(lengths) == {16 + module.codec.encoder.format_at(step).payload_bytes}
        # Each client is sent what the pass announces, and with the first pass the model; headers are what is left.
        told = len(pack(wire.broadcast[number, step])) + (0 if step else model)
        sizes = carried.of_pass(number, step)
        assert len(sizes) == 8 and all(told < size < told + 100 for size in sizes)
    for number in range(3):
        sent = [wire.messages[number, step] for step in range(module.codec.passes)]
        assert history.rounds("bytes/uplink_round")[number] == sum(map(sum, sent))


def test_power_sgd_broadcasts_q_before_and_p_between_the_passes():
    carried, wire = Carried(), Wire()
    module = federated(codec=PowerSGDCodec(1), clients=carried)
    run(module, 2, callbacks=[wire])
    assert [sorted(wire.broadcast[key]) for key in ((0, 0), (0, 1), (1, 0), (1, 1))] == [[], ["reply"], ["right"], ["reply"]]
    view = module.codec.encoder.view
    assert {len(wire.broadcast[number, 1]["reply"]) for number in range(2)} == {view.left_length}
    (first,), (later,) = (set(carried.of_pass(number, 0)) for number in range(2))  # the model, then the model and Q
    assert 4 * view.right_length < later - first < 4 * view.right_length + 50
    replies = [*carried.of_pass(0, 1), *carried.of_pass(1, 1)]
    assert all(4 * view.left_length < size < 4 * view.left_length + 100 for size in replies)
    assert module.server_state.traffic.downlink == 8 * (first + later) + sum(replies)


def fit(module, rounds, ckpt_path=None):
    runner = trainer(rounds, callbacks=[pretraining()])
    runner.fit(module, datamodule=federated_data(sampler=Uniform(4)), ckpt_path=ckpt_path, weights_only=False)
    return runner


@baselines
def test_six_rounds_are_three_and_three_more(make, tmp_path):
    straight = federated(codec=make())
    fit(straight, 6)
    fit(federated(codec=make()), 3).save_checkpoint(tmp_path / "three.ckpt")
    resumed = federated(codec=make())
    fit(resumed, 6, tmp_path / "three.ckpt")
    assert torch.equal(weights_of(resumed), weights_of(straight))
    assert resumed.server_state.traffic == straight.server_state.traffic
    kept = [len(str(module.store.state_dict())) for module in (resumed, straight)]
    assert kept[0] == kept[1]


def test_a_client_dropped_between_the_passes_keeps_its_old_residual():
    """It sent P, and its second message is lost: what it remembers is what it remembered before the round."""

    class LosesSecond(FederatedCallback):
        def on_client_update(self, trainer, pl_module, context, update):
            if (context.round, context.step, update.client) == (1, 1, 3):
                update.update.fill_(float("nan"))

    module = federated(codec=PowerSGDCodec(1))
    kept = {}

    class Keeps(FederatedCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # clients hear that a round counted after its end
            kept[trainer.global_step - 1] = [pl_module.store.peek(client)["codec"]["error"].clone() for client in (3, 2)]

    run(module, 2, callbacks=[LosesSecond(), Keeps()])
    assert torch.equal(kept[0][0], kept[1][0]) and not torch.equal(kept[0][1], kept[1][1])
    assert torch.isfinite(weights_of(module)).all()


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "codec",
    [
        {"class_path": "HalfCodec"},
        {"class_path": "QSGDCodec", "init_args": {"bits": 4, "bucket": 64, "norm": "max"}},
        {"class_path": "TopKCodec", "init_args": {"ratio": 8, "values": "float16"}},
        {"class_path": "LinearCodec", "init_args": {"ratio": 4, "basis": "random", "fresh": True, "block_size": 32}},
        {"class_path": "CountSketchCodec", "init_args": {"ratio": 4, "momentum": 0.5}},
        {"class_path": "fedlight.codecs.PowerSGDCodec", "init_args": {"rank": 1, "feedback": False}},
    ],
    ids=lambda codec: codec["class_path"],
)
def test_every_baseline_runs_from_yaml(codec, fedlight, tmp_path):
    file = tmp_path / "codec.yaml"
    file.write_text(json.dumps({"model": {"codec": codec}}))
    fedlight("fit", tmp_path, "--config", str(file), "--trainer.max_steps", "3")
    summary = json.loads((run_folders(tmp_path)[0] / "summary.json").read_text())
    assert summary["rounds"] == 3 and 1 < summary["uplink_ratio"] < 12
