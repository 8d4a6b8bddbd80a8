"""A wire that whole runs go by, and that keeps what passes on it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from fedlight.rounds import Clients, Connection, Reply, Request, ThroughBytes

Place = tuple[int, int, int, str, int]
"""Round, attempt, pass, stage and client of a message."""


class Carried(ThroughBytes):
    """Carries a run's messages as bytes, as `ThroughBytes` does, and remembers how many each had."""

    def __init__(self) -> None:
        super().__init__()
        self.down: dict[Place, int] = {}
        self.up: dict[Place, int] = {}

    def attach(self, run: Connection) -> Clients:
        self.clients, self.format = run.simulated(), run.format
        return self

    def exchange(self, requests: Sequence[Request]) -> Generator[Reply]:
        def place(message: Request | Reply) -> Place:
            context = requests[0].context
            return context.round, context.attempt, context.step, message.stage, message.client

        self.down |= {place(request): len(request.to_bytes()) for request in requests}
        with closing(super().exchange(requests)) as replies:
            for reply in replies:
                self.up[place(reply)] = len(reply.to_bytes())
                yield reply

    def of_pass(self, round: int, step: int) -> list[int]:
        """Return how many bytes each client was sent in one pass of a round."""
        return [size for (number, _, at, _, _), size in self.down.items() if (number, at) == (round, step)]
