"""What is stated is at least what it cost: epsilon of all the sums that an adversary opened with what a run had sent.

Two attempts at a round fail at their last stage, because shares that unmask arrive too late, or are too few; the third succeeds.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest

from fedlight.aggregation import SecureAggregator
from fedlight.aggregation.secure_aggregator import UNMASKING
from fedlight.codecs import TwoSidedCodec
from fedlight.privacy import DistributedDP
from fedlight.privacy.accounting import discrete_sum_multiplier, epsilon
from fedlight.rounds import Clients
from tests.federation import Fixed, Spy, federated, federated_data, pretraining, trainer

CLIENTS, THRESHOLD, COLLUDING, DELTA = 6, 6, 2, 1e-2


class Kept(SecureAggregator):
    """Keeps the server's side of every attempt."""

    def collector(self, *arguments: Any, **options: Any) -> Any:
        self.last = super().collector(*arguments, **options)
        return self.last


class Late(Clients):
    """A wire on which so many answers of the last stage arrive in the first two attempts; an adversary comes by the others too."""

    def __init__(self, aggregator: Kept, arrive: int) -> None:
        self.aggregator, self.arrive = aggregator, arrive
        self.opened: list[np.ndarray] = []

    def attach(self, run: Any) -> Clients:
        self.simulated = run.simulated()
        return self

    def exchange(self, requests: Sequence[Any]) -> Generator[Any]:
        if not requests or requests[0].stage != UNMASKING:
            yield from self.simulated.exchange(requests)
            return
        adversary, replies = copy.copy(self.aggregator.last.server), list(self.simulated.exchange(requests))
        adversary._unmasking, adversary.liars = {}, set()
        for reply in replies:
            adversary.collect_unmasking(reply.client, bytes(reply.payload))
        self.opened.append(adversary.total()[0])
        yield from replies[: self.arrive if requests[0].context.attempt < 2 else len(replies)]

    def settle(self, key: Any, counted: Any) -> None:
        self.simulated.settle(key, counted)


@pytest.mark.parametrize(
    ("arrive", "colluding"), [(0, 0), (THRESHOLD - COLLUDING, COLLUDING)], ids=["answers come too late", "a coalition adds its own shares"]
)
def test_attempts_that_fail_at_the_last_stage_are_in_the_stated_epsilon(arrive: int, colluding: int) -> None:
    """The server, which was told too little, or those who collude with it, have enough to open the sums that the run gave up."""
    aggregator, spy = Kept(cohort=CLIENTS, threshold=THRESHOLD), Spy()
    wire = Late(aggregator, arrive)
    privacy = DistributedDP(0.5, THRESHOLD, colluding, noise_multiplier=1.0, delta=DELTA, simulation_seed=0)
    module = federated(codec=TwoSidedCodec(2), privacy=privacy, aggregator=aggregator, clients=wire)
    trainer(1, callbacks=[pretraining(), spy]).fit(module, datamodule=federated_data(sampler=Fixed([*range(CLIENTS)]), normalize=False))
    assert len(wire.opened) == 3 and (wire.opened[-1] == spy.totals[0].numpy()).all(), "the adversary opened nothing"
    assert len({opened.tobytes() for opened in wire.opened}) == 3

    deviation = privacy.share_deviation(privacy.multiplier, privacy.grid)  # whoever colludes takes its own noise off the sum
    multiplier = discrete_sum_multiplier(privacy.grid, deviation, CLIENTS - colluding, privacy.setting.length)
    true, of_one = (epsilon("rdp", ((multiplier, 1.0, sums),), DELTA) for sums in (len(wire.opened), 1))
    assert privacy.epsilon() >= true * (1 - 1e-12) and privacy.epsilon(amplified=False) >= true * (1 - 1e-12)
    assert true > 1.5 * of_one, "the sums of attempts that failed cost as much as the one that counted"
