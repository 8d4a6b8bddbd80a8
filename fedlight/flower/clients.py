"""Flower's nodes as a federated run reaches them: `model.clients: FlowerClients`."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedlight.core.errors import ConfigurationError, require, require_positive
from fedlight.deploy import Nodes
from fedlight.deploy.protocol import Letter

log = logging.getLogger(__name__)

KIND = "train.letter"
"""The type of every message: what it asks is in the letter."""

CHUNKED = 1 << 20
"""Bytes of a download beyond which it travels as an array, which Flower sends in pieces and stores once for all nodes."""

ERRORS = {
    1: "its node cannot load the app",
    2: "its app failed, for a reason that only its own log tells",
    3: "the request expired before it was answered",
    4: "the reply expired",
    5: "its node is gone",
    7: "its node does not trust the app",
    8: "its app was killed",
}
"""What the server says of Flower's errors: their own words could hold a client's data."""


class FlowerClients(Nodes):
    """The clients are SuperNodes, known by the names that they were registered with (`flwr supernode register KEY LINK --name NAME`).

    Args:
        nodes: The registered names of all nodes; a client's number in the run is its place.
        keys: Folder of the clients' public identity keys (``NAME.pub``), which secure aggregation needs.
        timeout: Seconds that a stage of a round waits for replies. A node that has not replied by then has dropped out.
        wait: Seconds that a round waits for enough nodes to be online.
        poll: Seconds between two looks for replies.
        reproducible: Whether clients draw batches and rounding from the public seed, as a simulation does: whoever knows the seed can
            compute them. Else from their operating system.
        longest_reply: MiB beyond which a reply is dropped unread.

    Raises:
        ConfigurationError: if a number is out of range, names are missing or not distinct, or no network is there.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        keys: str | None = None,
        timeout: float = 120.0,
        wait: float = 600.0,
        poll: float = 0.2,
        reproducible: bool = False,
        longest_reply: float = 1024.0,
    ) -> None:
        super().__init__(nodes, keys, reproducible, longest_reply)
        require_positive(timeout=timeout, poll=poll)
        require(wait >= 0, f"Expected `wait` >= 0 but got {wait}")
        self.timeout = timeout
        self.wait = wait
        self.poll = poll
        self._grid: Grid | None = None
        self._late: dict[str, str] = {}  # messages that nobody waits for any more, and whom they are from
        self._up = self._down = 0

    def connect(self, grid: Grid) -> None:
        """Use this connection to the SuperLink."""
        self._grid = grid

    @property
    def grid(self) -> Grid:
        """The connection to the SuperLink."""
        if self._grid is None:
            raise ConfigurationError(
                "Expected a run that Flower started but this process has no SuperLink: start it with `flwr run`, or set `model.clients` to "
                "null for a simulation"
            )
        return self._grid

    def online(self) -> dict[int, int]:
        """Return Flower's id of every client that is online."""
        known = {node.name: node.node_id for node in self.grid.get_nodes() if node.status == "online"}
        return {client: known[name] for client, name in enumerate(self.nodes) if name in known}

    def present(self, least: int) -> list[int] | None:
        """Return the clients that are online, once there are ``least``, or after ``wait`` seconds however many there are."""
        start, told = time.monotonic(), -10.0
        while len(online := self.online()) < least and (waited := time.monotonic() - start) < self.wait:
            if waited - told >= 10:
                missing = ", ".join(name for client, name in enumerate(self.nodes) if client not in online)
                log.warning("Waiting for %d of %d nodes, up to %.0f s more: %s", least - len(online), least, self.wait - waited, missing)
                told = waited
            time.sleep(max(self.poll, 0.5))
        return sorted(online)

    def send(self, letters: Mapping[int, Letter], what: str) -> Generator[tuple[int, bytes]]:
        """Send letters to those who are online, and yield answers until all are in or the stage's time is over."""
        online = self.online()
        asked = [client for client in letters if client in online]
        messages = [self._message(online[client], letters[client], what) for client in asked]
        self._down += sum(map(carried_bytes, messages))
        ids = list(self.grid.push_messages(messages)) if messages else []
        waiting = {id: client for id, client in zip(ids, asked, strict=True) if id}
        end = time.monotonic() + self.timeout
        while waiting and time.monotonic() < end:
            replies = list(self.grid.pull_messages([*waiting, *self._late]))
            self._up += sum(map(carried_bytes, replies))
            for reply in replies:
                client = waiting.pop(reply.metadata.reply_to_message_id, None)
                if client is None:
                    sender = self._late.pop(reply.metadata.reply_to_message_id, "a node that was not asked")
                    log.warning("A reply of %s came too late, and was dropped", sender)
                else:
                    answer = self._answer(client, reply, what)
                    if answer is not None:
                        yield client, answer
            if waiting and not replies:
                time.sleep(self.poll)
        for id, client in waiting.items():
            log.warning("Round %s: no reply of %s within %.0f s", what, self._named(client), self.timeout)
            self._late[id] = f"{self._named(client)} in round {what}"

    def figures(self) -> dict[str, float]:
        """Return the bytes that Flower carried, its own part of every message included; HTTP headers come on top."""
        return {"engine_uplink": float(self._up), "engine_downlink": float(self._down)}

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the run, and what was carried so far."""
        return {**super().state_dict(), "carried": (self._up, self._down)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of a checkpoint."""
        super().load_state_dict(state)
        self._up, self._down = state.get("carried", (0, 0))

    def _message(self, node: int, letter: Letter, what: str) -> Message:
        content = {"letter": ConfigRecord({"question": letter.question})}
        if len(letter.download) > CHUNKED:
            content["download"] = ArrayRecord([np.frombuffer(letter.download, np.uint8)])  # type: ignore[assignment]
        elif letter.download:
            content["letter"]["download"] = letter.download
        # An expired request is dropped by its node, which would else train a round that is long over.
        return Message(RecordDict(content), dst_node_id=node, message_type=KIND, ttl=self.timeout, group_id=what)  # type: ignore[arg-type]

    def _named(self, client: int) -> str:
        """Return how logs call a client that was asked."""
        return self.nodes[client] if self.names_clients else "a node"

    def _answer(self, client: int, reply: Message, what: str) -> bytes | None:
        if reply.has_error():
            reason = ERRORS.get(reply.error.code, f"Flower reports error {reply.error.code}")
            log.warning("Round %s: no answer of %s: %s", what, self._named(client), reason)
            return None
        record = reply.content.get("answer")
        answer = record.get("answer") if isinstance(record, ConfigRecord) else None
        return answer if isinstance(answer, bytes) else b"\xff"  # no status: dropped, and named


def carried_bytes(message: Message) -> int:
    """Return the bytes of all objects that a message travels as."""
    return 0 if message.has_error() else sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def read_letter(content: RecordDict) -> Letter:
    """Return the letter in a message; raises ``KeyError`` or ``TypeError`` if there is none."""
    record = content["letter"]
    assert isinstance(record, ConfigRecord)
    question, download = record["question"], record.get("download", b"")
    if "download" in content:
        arrays = content["download"]
        assert isinstance(arrays, ArrayRecord)
        download = next(iter(arrays.values())).numpy().tobytes()
    assert isinstance(question, bytes)
    assert isinstance(download, bytes)
    return Letter(question, download)
