"""Clients in other processes, as the server reaches them: everything of the port but how a letter travels."""

from __future__ import annotations

import logging
import secrets
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fedlight.aggregation.base import Aggregator
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.deploy.protocol import REASONS, Envelope, Letter, Status, read_answer, settings_digest, split
from fedlight.deploy.settings import Terms, write_settings
from fedlight.rounds.clients import Clients, Connection
from fedlight.rounds.messages import Reply, ReplyFormat, Request, Simulation

log = logging.getLogger(__name__)


class Nodes(Clients):
    """Clients that live elsewhere, each with its own data, keys and state. They get the settings of the run with their first request.

    Args:
        nodes: The clients' names, as the network knows them; a client's number in the run is its place.
        keys: Folder of the clients' public identity keys (``NAME.pub``), which secure aggregation needs.
        reproducible: Whether clients draw batches and rounding from the public seed, as a simulation does: whoever knows the seed can
            compute them. Else from their operating system.
        longest_reply: MiB beyond which a reply is dropped unread.

    Raises:
        ConfigurationError: if names are missing or not distinct, or (before training) the run is one that no network can carry.
    """

    simulates: ClassVar[bool] = False

    names_clients = True
    """Whether logs may name who was asked: not where privacy counts on nobody knowing who took part."""

    def __init__(self, nodes: Sequence[str], keys: str | None = None, reproducible: bool = False, longest_reply: float = 1024.0) -> None:
        self.nodes = list(nodes)
        if not nodes or len(set(nodes)) < len(nodes):
            raise ConfigurationError(f"Expected `nodes` to be the distinct names of the clients but got {list(nodes)}")
        self.keys = keys
        self.reproducible = reproducible
        self.longest_reply = longest_reply
        self.model: Mapping[str, Any] | None = None
        self.augmentation: Any = None
        self.run = secrets.token_hex(8)
        self._settings = ""
        self._digest = b""
        self._told: set[int] = set()  # who was sent the settings
        self._format: ReplyFormat

    def configure(self, model: Mapping[str, Any], augmentation: Any) -> None:
        """Take the configured `model` and `data.augmentation`, of which clients are told their part."""
        self.model, self.augmentation = model, augmentation

    def attach(self, run: Connection) -> Clients:
        """Write the settings that clients get, and return this object."""
        if self.model is None:
            raise ConfigurationError(
                f"Expected {type(self).__name__} in a run that a network carries but this process has none: start it with `flwr run`, or "
                "set `model.clients` to null for a simulation"
            )
        if run.population != len(self.nodes):
            raise ConfigurationError(
                f"Expected as many `nodes` as clients but got {len(self.nodes)} names and {run.population} clients: set `data.num_clients`"
            )
        accounting = None if run.privacy is None else run.privacy.setting
        terms = Terms(run.codec.config(), tuple(self.nodes), self.reproducible, accounting, run.population, run.constants, run.rounds)
        self.names_clients = run.privacy is None or not run.privacy.amplified
        self._settings = write_settings(self.model, self.augmentation, terms)
        self._digest = settings_digest(self._settings)
        self._told = set()
        self._format = run.format
        self._enroll(run.aggregator)
        return self

    def _enroll(self, aggregator: Aggregator) -> None:
        if not aggregator.hides_messages:
            return
        from fedlight.aggregation.secure import Directory  # needs packages that the rest does without

        if self.keys is None:
            raise ConfigurationError(
                f"Expected `keys`, the folder of the clients' public identity keys, with {type(aggregator).__name__} but got none: set "
                "`model.clients.init_args.keys`"
            )
        aggregator.enroll(Directory(Path(self.keys), self.nodes), self._digest.hex())

    def name(self, client: int) -> str:
        """Return the client's own name, by which its owner knows it."""
        return self.nodes[client] if client < len(self.nodes) else super().name(client)

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the run: clients find by it what they kept."""
        return {"run": self.run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of a checkpoint, if it was one of this kind."""
        self.run = state.get("run", self.run)

    @abstractmethod
    def send(self, letters: Mapping[int, Letter], what: str) -> Generator[tuple[int, bytes]]:
        """Send each client its letter and yield (client, answer) as answers arrive; clients may stay silent.

        ``what`` names round and stage, for logs.
        """

    def exchange(self, requests: Sequence[Request]) -> Generator[Reply]:
        """Send requests and yield the replies; a client that lacks the settings is sent them."""
        asked = {request.client: request for request in requests}
        lacking = yield from self._ask(asked)
        self._told -= {request.client for request in lacking}
        if lacking:
            yield from self._ask({request.client: request for request in lacking}, again=True)

    def _ask(self, requests: Mapping[int, Request], again: bool = False) -> Generator[Reply, None, list[Request]]:
        if not requests:
            return []
        first = next(iter(requests.values()))
        what, lacking = f"{first.context.round}/{first.context.attempt} {first.stage}", []
        for client, data in self.send({client: self._letter(request) for client, request in requests.items()}, what):
            request = requests[client]
            try:
                status, reply = self._read(data)
                if status is Status.LACKS_SETTINGS and not again:
                    lacking.append(request)
                    continue
                if status is not Status.ANSWER:
                    raise MessageError(REASONS[status])
                yield self._format.parse(request, reply)
            except MessageError as error:
                yield Reply(client, request.stage, b"", simulation=Simulation(reason=str(error)))
        return lacking

    def _read(self, data: bytes) -> tuple[Status, bytes]:
        if len(data) > self.longest_reply * 2**20:
            raise MessageError(f"its reply has {len(data) / 2**20:.1f} MiB, and `longest_reply` is {self.longest_reply}")
        return read_answer(data)

    def _letter(self, request: Request) -> Letter:
        client = request.client
        settings = "" if client in self._told else self._settings
        self._told.add(client)
        bare, download = split(request)
        return Letter(Envelope(self.run, client, self.nodes[client], self._digest, settings, bare).to_bytes(), download)


class InProcess(Nodes):
    """Nodes of this process, which answer letters one after another: what a network carries, without one.

    Args:
        answer: maps (client, letter) to the client's answer, or to None for silence.
        nodes: the clients' names.
        settings: the other arguments of ``Nodes``.
    """

    def __init__(self, answer: Callable[[int, Letter], bytes | None], nodes: Sequence[str], **settings: Any) -> None:
        super().__init__(nodes, **settings)
        self.answer = answer

    def send(self, letters: Mapping[int, Letter], what: str) -> Generator[tuple[int, bytes]]:
        """Yield the answers in the order of the letters."""
        for client, letter in letters.items():
            answer = self.answer(client, letter)
            if answer is not None:
                yield client, answer
