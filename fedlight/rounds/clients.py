"""The clients of a round as the server reaches them: the port, clients simulated in this process, and the same through bytes."""

from __future__ import annotations

import heapq
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fedlight.aggregation.base import TRAIN, Aggregator
from fedlight.core.codec import Codec, Key
from fedlight.core.errors import MessageError
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds.availability import Availability, Full
from fedlight.rounds.host import ClientHost
from fedlight.rounds.messages import Reply, ReplyFormat, Request, Simulation
from fedlight.rounds.reduce import gather


@dataclass(frozen=True)
class Connection:
    """What carries requests may know of a run, before it begins.

    Attributes:
        format: what follows the payload of a reply that carries a code.
        simulated: makes the clients of this process.
        codec: the codec, maybe not fitted yet.
        aggregator: how codes are summed.
        privacy: the mechanism that protects codes, if any.
        population: how many clients there are.
        constants: digests of what clients have to have of the network and nobody is sent, where these are not in this process.
        rounds: how many rounds there will be; -1 if that is not set.
    """

    format: ReplyFormat
    simulated: Callable[[], Clients]
    codec: Codec
    aggregator: Aggregator
    privacy: PrivacyMechanism | None = None
    population: int = 0
    constants: Mapping[str, str] = field(default_factory=dict)
    rounds: int = -1


class Clients(ABC):
    """Carries requests to clients and their replies back."""

    @abstractmethod
    def exchange(self, requests: Sequence[Request]) -> Generator[Reply]:
        """Yield replies to the requests of one stage as they arrive; clients may stay silent.

        Nothing of a client is kept here once its reply has been taken, so that one update is in memory at a time.
        """

    def settle(self, key: Key, counted: Collection[int]) -> None:  # noqa: B027 (a network has its requests for it)
        """Hear how an attempt ended: what the ``counted`` clients changed in it is final, what all others changed is not.

        Over a network clients read it in their next request (``Request.settled``).
        """

    simulates: ClassVar[bool] = True
    """Whether the clients live in this process, so that a run needs their data."""

    def attach(self, run: Connection) -> Clients:
        """Return what a run talks to, before it begins: this, unless it needs the simulated clients of this process."""
        return self

    def present(self, least: int) -> list[int] | None:
        """Return the clients that can be asked now, None for all; waits, for as long as makes sense, for at least so many."""
        return None

    def name(self, client: int) -> str:
        """Return what logs and errors call a client."""
        return f"client {client}"

    def named(self, sentence: str) -> str:
        """Return a sentence that names clients by number with what they are called."""
        return re.sub(r"\bclient (\d{1,9})\b", lambda found: self.name(int(found[1])), sentence)

    def figures(self) -> dict[str, float]:
        """Return what the connection has to say of itself, such as the bytes that it carried, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know of the connection."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most remember nothing)
        """Restore what ``state_dict`` returned."""


@dataclass(eq=False)
class Simulated(Clients):
    """Clients that live in this process, or in several that share out every cohort.

    Args:
        host: the clients' side.
        availability: which of them answer, and how far.
        work: how many samples a client goes through in a round: shares are of equal work.
        stages: the stages of the aggregation.
        rank: this process among ``world``.
        world: how many processes there are.
    """

    host: ClientHost
    availability: Availability = field(default_factory=Full)
    work: Callable[[int], int] = lambda client: 1
    stages: Sequence[str] = (TRAIN,)
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self._key: Key | None = None
        self._silent: dict[int, str] = {}
        self._mine: set[int] = set()

    def exchange(self, requests: Sequence[Request]) -> Generator[Reply]:
        """Yield the replies of this process's clients that are still there."""
        if requests and requests[0].context.key != self._key:
            self._invite(requests)
        answering = []
        for request in requests:
            if request.client not in self._mine:
                continue
            silent = self._silent.get(request.client)
            if silent is None or self.stages.index(silent) > self.stages.index(request.stage):
                answering.append(request)
            else:
                with suppress(MessageError):
                    self.host.receive(request)  # it downloads the model, and says nothing
        return self.host.answers(answering)

    def settle(self, key: Key, counted: Collection[int]) -> None:
        """Have the host keep or forget what clients changed; every process keeps all of it, whoever ran them."""
        shared = self.world > 1 and self.host.stateful
        self.host.settle(counted, (lambda states: dict(gather(list(states.items())))) if shared else lambda states: states)

    def _invite(self, requests: Sequence[Request]) -> None:
        """Draw who answers, and which of the cohort this process runs."""
        context = requests[0].context
        cohort = np.array([request.client for request in requests], dtype=np.int64)
        work = np.array([self.work(client) for client in cohort.tolist()], dtype=np.int64)
        self._key = context.key
        self._silent = self.availability.silent_from(cohort, work, context, self.stages)
        there = np.array([self._silent.get(client) != self.stages[0] for client in cohort.tolist()], dtype=bool)
        mine = balanced_shares(cohort[there], work[there], self.world)[self.rank]
        absent = cohort[~there][self.rank :: self.world]
        self._mine = {*mine.tolist(), *absent.tolist()}


class ThroughBytes(Clients):
    """Serialises and parses all that passes between the server and other ``clients``: what arrives is what a network would carry.

    What only a simulation sees stays behind, and so does ``settle``: clients read how an attempt ended in their next request.

    Args:
        clients: the clients; in a run those that are simulated in this process.
        format: what follows the payload of a reply that carries a code; in a run what its settings make of it.
    """

    def __init__(self, clients: Clients | None = None, format: ReplyFormat | None = None) -> None:
        self.clients = clients
        self.format = format

    def exchange(self, requests: Sequence[Request]) -> Generator[Reply]:
        """Yield the replies, each parsed from its bytes."""
        carried = {request.client: Request.parse(request.client, request.to_bytes()) for request in requests}
        assert self.clients is not None, "attached before a run"
        assert self.format is not None, "attached before a run"
        with closing(self.clients.exchange(list(carried.values()))) as replies:
            for reply in replies:
                try:
                    arrived = self.format.parse(carried[reply.client], reply.to_bytes())
                except MessageError as error:
                    arrived = Reply(reply.client, reply.stage, b"", simulation=Simulation(reason=str(error)))
                yield arrived

    def attach(self, run: Connection) -> Clients:
        """Return these bytes around the simulated clients."""
        return ThroughBytes(self.clients or run.simulated(), self.format or run.format)


def balanced_shares(clients: np.ndarray, work: np.ndarray, processes: int) -> list[np.ndarray]:
    """Return the clients ``[n]`` of every process, in their order, such that all have about equal ``work`` ``[n]`` (samples to go through).

    The longest go first, each to the process with the least work so far: none then works more than 4/3 as long as in the best division
    (Graham 1969, Theorem 2). Equal clients, and those without work, are dealt out in turn. Everyone who calls this finds the same shares.
    """
    if processes == 1:
        return [clients]
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0, 0, process) for process in range(processes)]  # work and clients so far
    for place in np.argsort(-work, kind="stable").tolist():
        load, count, process = loads[0]
        shares[process].append(place)
        heapq.heapreplace(loads, (load + work[place].item(), count + 1, process))
    return [clients[np.sort(np.array(share, dtype=np.int64))] for share in shares]
