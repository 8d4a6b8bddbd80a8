"""A simulation is what a network would be: the same run by way of the bytes of every message, bit for bit.

Every codec, algorithm, aggregator, privacy mechanism and downlink runs through it: a new one is one more row of its family's table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedlight.aggregation import Median, NormBound, PlainAggregator, SecureAggregator, TrimmedMean
from fedlight.clients import Ditto, FedAvg, FedDyn, FedNova, FedProx, FedSGD, QFedAvg, Scaffold
from fedlight.codecs import (
    ChainCodec,
    EntropyCodec,
    HalfCodec,
    IdentityCodec,
    LinearCodec,
    QuantizeCodec,
    TopKCodec,
    TransformCodec,
    TwoSidedCodec,
)
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout, flatten
from fedlight.core.random import torch_generator
from fedlight.modules.checks import private_codec
from fedlight.privacy import AdaptiveClipping, CentralDP, DistributedDP, LocalDP, PrivacyMechanism
from fedlight.rounds import CatchUp, Clients, CodedModel, DropOut, FullModel, StageDropOut
from tests.codecs.test_contract import CODECS
from tests.rounds.federation import Federation, federation, network

LOCAL: dict[str, Any] = {"lr": 0.1, "steps": 3, "batch_size": 8}


def integers() -> Codec:
    return ChainCodec([LinearCodec(2, "random", block_size=16), QuantizeCodec(6)])


def same(make: Callable[..., Federation], rounds: int = 4) -> tuple[Federation, Federation]:
    """Run both ways and compare everything that stays: weights, buffers, sums, what server and clients keep, and every byte."""
    plain, carried = make().run(rounds), make(through_bytes=True).run(rounds)
    assert torch.equal(plain.weights, carried.weights) and torch.equal(plain.buffers, carried.buffers)
    for one, other in zip(plain.calls, carried.calls, strict=True):
        assert one.answered == other.answered and one.context.key == other.context.key
        assert one.codes.total is not None and other.codes.total is not None and torch.equal(one.codes.total, other.codes.total)
    assert plain.server.state.traffic == carried.server.state.traffic
    assert plain.server.state.settled == carried.server.state.settled
    return plain, carried


def network_weights(norm: bool) -> torch.Tensor:
    """Return the initial weights ``[dim]``."""
    return flatten(network(norm).parameters())


def fits(codec: Codec) -> bool:
    """Whether the codec can be made for the small network: some codes would be longer than its update."""
    try:
        codec.bind(Layout.of(network()))
    except ConfigurationError:
        return False
    return True


@pytest.mark.quick(15)
@pytest.mark.parametrize("name", [name for name, make in CODECS.items() if fits(make())])
def test_every_codec(name: str) -> None:
    same(lambda **way: federation(CODECS[name](), **way))


def test_most_codecs_fit() -> None:
    assert sum(fits(make()) for make in CODECS.values()) > 0.8 * len(CODECS)


ALGORITHMS = {
    "FedAvg": lambda: FedAvg(momentum=0.5, weight_decay=0.1, **LOCAL),
    "FedProx": lambda: FedProx(0.1, **LOCAL),
    "FedSGD": FedSGD,
    "FedDyn": lambda: FedDyn(**LOCAL),
    "FedNova": lambda: FedNova(**LOCAL),
    "q-FedAvg": lambda: QFedAvg(**LOCAL),
    "Ditto": lambda: Ditto(**LOCAL),
    "SCAFFOLD": lambda: Scaffold(**LOCAL),
}


@pytest.mark.quick(8)
@pytest.mark.parametrize("codec", [IdentityCodec, lambda: TopKCodec(2)], ids=["identity", "top-k"])
@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm(make: Callable[[], Any], codec: Callable[[], Codec]) -> None:
    same(lambda **way: federation(codec(), make(), availability=DropOut(0.2), by_samples=True, **way), rounds=6)


AGGREGATORS = {
    "plain": PlainAggregator,
    "norm bound": lambda: NormBound(0.1),
    "trimmed mean": lambda: TrimmedMean(0.2),
    "median": Median,
    "secure": lambda: SecureAggregator(8, threshold=5),
}


@pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS)
def test_every_aggregator(make: Callable[[], Any]) -> None:
    same(lambda **way: federation(integers(), aggregator=make(), availability=DropOut(0.1), **way))


@pytest.mark.parametrize("seed", range(3))
def test_secure_aggregation_with_drop_outs_at_any_stage(seed: int) -> None:
    def make(**way: Any) -> Federation:
        availability = StageDropOut(clients=1, seed=seed)
        return federation(integers(), aggregator=SecureAggregator(8, threshold=5), availability=availability, max_attempts=9, **way)

    same(make, rounds=5)


def test_secure_aggregation_with_weights() -> None:
    same(lambda **way: federation(integers(), aggregator=SecureAggregator(8, 5, max_weight=40), by_samples=True, **way))


MECHANISMS = {
    "central": lambda: CentralDP(0.5, 1.0, delta=1e-4, simulation_seed=0),
    "adaptive": lambda: CentralDP(0.5, 1.0, delta=1e-4, simulation_seed=0, adaptive=AdaptiveClipping(bit_noise=2.0)),
    "distributed": lambda: DistributedDP(1.0, 3, noise_multiplier=1.0, delta=1e-4, simulation_seed=0),
    "local": lambda: LocalDP(1.0, 1.0, delta=1e-4, simulation_seed=0),
}


@pytest.mark.parametrize("make", MECHANISMS.values(), ids=MECHANISMS)
def test_every_privacy_mechanism(make: Callable[[], PrivacyMechanism]) -> None:
    def run(**way: Any) -> Federation:
        privacy = make()
        return federation(private_codec(LinearCodec(2, "random", block_size=16), privacy), privacy=privacy, **way)

    plain, carried = same(run)
    assert plain.server.privacy is not None and carried.server.privacy is not None
    assert plain.server.privacy.state_dict() == carried.server.privacy.state_dict()


CATCHING_UP: dict[str, Callable[[], Codec]] = {
    "identity": IdentityCodec,
    "random projection": integers,
    "two-sided": lambda: TwoSidedCodec(2),
    "transform": lambda: TransformCodec(3, encoder_share=2.0),
    "transform, energy corrected": lambda: TransformCodec(3, encoder_share=2.0, correct_energy=True),
    "transform, probes": lambda: TransformCodec(3, encoder_share=2.0, probes=1),
    "PCA": lambda: LinearCodec(2, block_size=16),
    "half": HalfCodec,
    "entropy": lambda: ChainCodec([TwoSidedCodec(2), EntropyCodec(4)]),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("norm", [False, True], ids=["", "BatchNorm"])
@pytest.mark.parametrize("codec", CATCHING_UP.values(), ids=CATCHING_UP)
def test_every_downlink(codec: Callable[[], Codec], norm: bool) -> None:
    full, _ = same(lambda **way: federation(codec(), downlink=FullModel(), norm=norm, **way), rounds=9)
    by_sums, _ = same(lambda **way: federation(codec(), downlink=CatchUp(), norm=norm, **way), rounds=9)
    assert torch.equal(full.weights, by_sums.weights)
    assert by_sums.server.state.traffic.downlink <= full.server.state.traffic.downlink
    coded, _ = same(lambda **way: federation(codec(), downlink=CodedModel(error=0.01), norm=norm, **way), rounds=9)
    moved = full.weights - network_weights(norm)
    assert (coded.weights - full.weights).norm() < 0.2 * moved.norm(), "rounding led it elsewhere"


@pytest.mark.parametrize("personal", [False, True], ids=["mean", "local"])
@pytest.mark.parametrize("by_samples", [False, True])
def test_buffers_and_weights(personal: bool, by_samples: bool) -> None:
    same(lambda **way: federation(integers(), norm=True, personal=personal, by_samples=by_samples, **way))


class Counted(Clients):
    """Adds up the bytes of everything that passes."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.down = self.up = 0

    def exchange(self, requests):
        self.down += sum(len(request.to_bytes()) for request in requests)
        for reply in self.clients.exchange(requests):
            self.up += len(reply.to_bytes())
            yield reply

    def settle(self, key, counted):
        self.clients.settle(key, counted)


@pytest.mark.parametrize("aggregator", [PlainAggregator, lambda: SecureAggregator(8, 5)], ids=["plain", "secure"])
def test_traffic_is_what_passed(aggregator: Callable[[], Any]) -> None:
    run = federation(integers(), aggregator=aggregator(), downlink=CatchUp(), wrap=Counted).run(5)
    traffic, counted = run.server.state.traffic, run.clients
    assert isinstance(counted, Counted)
    assert (traffic.downlink, traffic.uplink) == (counted.down, counted.up)


class Forgetful(Clients):
    """Loses everything that some clients hold before a round, as a device that was set up again."""

    def __init__(self, clients: Any, lost: dict[int, int]) -> None:
        self.clients = clients
        self.lost = lost  # client by round

    def exchange(self, requests):
        client = self.lost.pop(requests[0].context.round, None)
        if client is not None:
            self.clients.host.held.forget(client)
        yield from self.clients.exchange(requests)

    def settle(self, key, counted):
        self.clients.settle(key, counted)


def test_a_client_that_lost_what_it_held_says_so_and_downloads_the_whole() -> None:
    def make(lost: dict[int, int]) -> Federation:
        codec = TransformCodec(3, encoder_share=2.0)
        return federation(codec, downlink=CatchUp(), through_bytes=True, wrap=lambda clients: Forgetful(clients, lost)).run(8)

    kept, lost = make({}), make({4: 1, 6: 3})
    assert torch.equal(kept.weights, lost.weights)
    assert lost.server.state.traffic.codec > kept.server.state.traffic.codec
    assert [call.answered for call in kept.calls] == [call.answered for call in lost.calls]


def test_what_a_client_draws_depends_on_names_alone() -> None:
    """Law 5: whoever else is in the cohort, a client sends the same message."""
    sent: dict[tuple[int, ...], bytes] = {}

    class Heard(Counted):
        def exchange(self, requests):
            for reply in super().exchange(requests):
                if reply.client == 2:
                    sent[tuple(request.client for request in requests)] = bytes(reply.payload)
                yield reply

    for cohort in ([2], [1, 2], [7, 2, 5]):
        federation(integers(), cohort=lambda number, attempt, cohort=cohort: cohort, wrap=Heard).run(1)
    assert len(sent) == 3 and len(set(sent.values())) == 1
    assert torch_generator(0, "batches").initial_seed() != torch_generator(1, "batches").initial_seed()
