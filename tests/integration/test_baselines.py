"""The baseline codecs in whole runs: what clients send is what a round without Lightning sends, resumed, over processes, counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fedlight.modules.downlink import broadcast_bytes

from fedlight.callbacks import FederatedCallback
from fedlight.codecs import ChainCodec, CountSketchCodec, HalfCodec, LinearCodec, PowerSGDCodec, QSGDCodec, TopKCodec
from fedlight.core.codec import Codec, Context, State
from fedlight.core.simulate import simulate_round
from fedlight.data import Uniform
from tests.federation import History, federated, federated_data, pretraining, run, trainer, weights_of

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
        updates = torch.stack([spy.uploads[number, 0, client].update for client in range(8)])
        context = Context(module.seed, number)
        assert torch.equal(simulate_round(module.codec, updates, None, context, server, clients), spy.aggregates[number])


@baselines
def test_bytes_of_every_pass_and_every_announcement_are_counted(make):
    module, wire = federated(codec=make()), Wire()
    history = History()
    run(module, 3, callbacks=[wire], logger=history)
    model = 4 * module.layout.dim
    assert module.server_state.traffic.uplink == sum(sum(lengths) for lengths in wire.messages.values())
    assert module.server_state.traffic.downlink == 3 * 8 * model + sum(
        8 * broadcast_bytes(broadcast) for broadcast in wire.broadcast.values()
    )
    assert module.server_state.traffic.messages == 24 and module.server_state.traffic.codec == 0
    for number in range(3):
        lengths = [wire.messages[number, step] for step in range(module.codec.passes)]
        assert history.rounds("bytes/uplink_round")[number] == sum(map(sum, lengths))
        for step, sent in enumerate(lengths):
            assert set(sent) == {16 + module.codec.encoder.format_at(step).payload_bytes}


def test_power_sgd_broadcasts_q_before_and_p_between_the_passes():
    module, wire = federated(codec=PowerSGDCodec(1)), Wire()
    run(module, 2, callbacks=[wire])
    assert [sorted(wire.broadcast[key]) for key in ((0, 0), (0, 1), (1, 0), (1, 1))] == [[], ["reply"], ["right"], ["reply"]]
    view = module.codec.encoder.view
    assert module.server_state.traffic.downlink == 16 * 4 * module.layout.dim + 8 * 4 * (2 * view.left_length + view.right_length)


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
    assert resumed.traffic.state_dict() == straight.traffic.state_dict()
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
        def on_round_end(self, trainer, pl_module, round):
            kept[round.context.round] = pl_module.store.peek(3)["codec"]["error"].clone(), pl_module.store.peek(2)["codec"]["error"].clone()

    run(module, 2, callbacks=[LosesSecond(), Keeps()])
    assert torch.equal(kept[0][0], kept[1][0]) and not torch.equal(kept[0][1], kept[1][1])
    assert torch.isfinite(weights_of(module)).all()


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
    summary = json.loads((tmp_path / "federated" / "version_0" / "summary.json").read_text())
    assert summary["rounds"] == 3 and 1 < summary["uplink_ratio"] < 12
