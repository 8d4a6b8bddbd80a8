"""Every algorithm in whole runs: through codecs, counted, resumed, with clients that do not answer."""

from __future__ import annotations

import gc

import pytest
import torch

from fedlight.callbacks import FederatedCallback
from fedlight.clients import Ditto, FedAvg, FedDyn, FedNova, QFedAvg, Scaffold
from fedlight.codecs import IdentityCodec, PowerSGDCodec, StackedCodec, TopKCodec
from fedlight.core.errors import ConfigurationError, RoundFailedError
from fedlight.core.wire import HEADER
from fedlight.data import Uniform
from fedlight.privacy import CentralDP
from fedlight.rounds import CatchUp, DropOut
from tests.federation import History, federated, federated_data, learned, mlp, pretraining, run, trainer, weights_of

ALGORITHMS = {
    "scaffold": lambda: Scaffold(0.1, 8, 3),
    "fednova": lambda: FedNova(0.1, 8, epochs=1),
    "feddyn": lambda: FedDyn(0.1, lr=0.1, batch_size=8, steps=3),
    "ditto": lambda: Ditto(0.1, lr=0.1, batch_size=8, steps=3),
    "q-fedavg": lambda: QFedAvg(1.0, lr=0.1, batch_size=8, steps=3),
}
CODECS = {"none": IdentityCodec, "learned": learned, "power sgd": lambda: PowerSGDCodec(1), "top-k": lambda: TopKCodec(4)}


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    return ALGORITHMS[request.param]()


@pytest.mark.quick(6)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_it_trains_through_every_kind_of_codec(algorithm, codec):
    history = History()
    run(federated(algorithm=algorithm, codec=codec()), 8, logger=history)
    losses = list(history.rounds("sim/loss").values())
    assert losses[-1] < losses[0]


@pytest.mark.quick(2)
def test_ten_rounds_are_five_and_five_more(algorithm, tmp_path):
    def fit(rounds, ckpt_path=None, memory=1024.0):
        module = federated(mlp(dropout=0.2), algorithm=algorithm, codec=learned(), availability=DropOut(0.3), client_memory_mb=memory)
        runner = trainer(rounds, callbacks=[pretraining()])
        runner.fit(module, datamodule=federated_data(sampler=Uniform(4)), ckpt_path=ckpt_path, weights_only=False)
        return runner, module

    straight = fit(10)[1]
    fit(5)[0].save_checkpoint(tmp_path / "five.ckpt")
    resumed = fit(10, tmp_path / "five.ckpt", memory=0.0)[1]  # what clients keep lies in files from here on
    assert torch.equal(weights_of(resumed), weights_of(straight))
    assert resumed.server_state.traffic == straight.server_state.traffic
    for client in range(8):
        mine, theirs = (module.store.peek(client).get("algorithm", {}) for module in (resumed, straight))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_all_that_scaffold_sends_is_counted_both_ways():
    plain, scaffold = federated(algorithm=FedAvg(0.1, 8, steps=3)), federated(algorithm=Scaffold(0.1, 8, 3))
    run(plain, 3)
    spy = run(scaffold, 3)
    dim, clients = plain.layout.dim, 8
    assert {len(reply.payload) for reply in spy.replies.values()} == {HEADER.size + 2 * 4 * dim + 4}
    assert scaffold.server_state.traffic.uplink == 3 * clients * (HEADER.size + 2 * 4 * dim + 4)
    # `c` is sent to every client once there is one: in the second and the third round.
    more = scaffold.server_state.traffic.downlink - plain.server_state.traffic.downlink
    assert 2 * clients * 4 * dim < more < 2 * clients * (4 * dim + 50)


def test_both_vectors_of_scaffold_go_through_the_codec():
    module, plain = federated(algorithm=Scaffold(0.1, 8, 3), codec=learned()), federated(codec=learned())
    spy, single = run(module, 2), run(plain, 2)
    assert isinstance(module.codec, StackedCodec)
    payload = len(single.replies[0, 0, 0].payload) - HEADER.size
    assert len(spy.replies[0, 0, 0].payload) == HEADER.size + 2 * payload + 4
    assert spy.totals[0].dtype == torch.int64


def test_a_fitted_codec_of_one_vector_serves_an_algorithm_of_two(tmp_path):
    from fedlight.core.export import save_codec

    plain = federated(codec=learned())
    run(plain, 1)
    save_codec(plain.codec, tmp_path)
    module = federated(algorithm=Scaffold(0.1, 8, 3), codec_path=str(tmp_path))
    run(module, 1)
    mine, theirs = module.codec.codec.encoder.state_dict(), plain.codec.encoder.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_an_algorithm_cannot_go_with_is_refused():
    with pytest.raises(ConfigurationError, match="`batch_norm` mean with Scaffold"):
        federated(algorithm=Scaffold(), batch_norm="local")
    with pytest.raises(ConfigurationError, match="no `privacy` with Scaffold"):
        federated(algorithm=Scaffold(), privacy=CentralDP(1.0, 1.0, delta=0.01))
    with pytest.raises(ConfigurationError, match="got FedNova"):
        run(federated(algorithm=FedNova(0.1, steps=1), downlink=CatchUp()), 1)


# -- clients that do not answer ----------------------------------------------------------------------------------------


def test_the_aggregate_is_the_mean_of_those_that_answered():
    """30 % drop out in every round: of the very clients that answered, nobody else's update is in the sum."""
    history = History()
    module = federated(availability=DropOut(0.3), weighting="samples")
    spy = run(module, 10, logger=history)
    absent = history.rounds("round/absent")
    assert sum(absent.values()) > 0
    for number in range(10):
        replies = [reply for (n, _, _), reply in spy.replies.items() if n == number]
        assert len(replies) == 8 - absent[number] == history.rounds("round/clients")[number]
        weights = torch.tensor([float(reply.weight) for reply in replies])
        mean = (torch.stack([reply.simulation.update for reply in replies]) * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(spy.aggregates[number], mean)
    losses = list(history.rounds("sim/loss").values())
    assert losses[-1] < losses[0]


def test_a_round_that_too_few_answer_is_repeated_and_several_stop_the_run():
    history = History()
    run(federated(availability=DropOut(0.5), min_clients=5, max_attempts=100), 5, logger=history)
    assert min(history.rounds("round/clients").values()) >= 5 and max(history.rounds("round/attempts").values()) > 1
    with pytest.raises(RoundFailedError, match="no usable aggregate of at least 8 clients in 3 attempts"):
        run(federated(availability=DropOut(0.9), min_clients=8), 1)


def tensors(kept) -> list[torch.Tensor]:
    if isinstance(kept, torch.Tensor):
        return [kept]
    return [t for part in (kept.values() if isinstance(kept, dict) else kept if isinstance(kept, list) else []) for t in tensors(part)]


class Census(FederatedCallback):
    """Counts live objects and the bytes of what is kept, in some rounds."""

    def __init__(self, *rounds: int) -> None:
        self.rounds, self.objects, self.bytes = rounds, [], []

    def on_round_end(self, trainer, pl_module, round):
        if round.context.round in self.rounds:
            gc.collect()
            self.objects.append(len(gc.get_objects()))
            kept = [*pl_module.store.state_dict().values(), pl_module.server_state.state_dict()]
            self.bytes.append(sum(t.numel() * t.element_size() for t in tensors(kept)))


@pytest.mark.slow
def test_nothing_grows_over_500_rounds():
    census = Census(99, 299, 499)
    module = federated(mlp(2), algorithm=Scaffold(0.1, 8, 1), codec=IdentityCodec(), availability=DropOut(0.3))
    data = federated_data(sampler=Uniform(3))
    trainer(500, callbacks=[census]).fit(module, datamodule=data)
    assert len(set(census.bytes)) == 1 and census.bytes[0] > 0
    assert max(census.objects) - min(census.objects) < 50
