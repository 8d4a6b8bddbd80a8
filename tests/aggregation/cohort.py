"""A cohort of clients and their server in one process, without a round around it: to test the protocol."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedlight.aggregation.secure import Identities, SecureClient, SecureServer, Session
from fedlight.core.errors import MessageError


class SecureCohort:
    """Runs one session: ``open`` before the clients train, ``send`` and ``receive`` for each, ``close`` for the sum.

    Between client and server nothing passes but messages, and ``server`` holds nothing else.

    Args:
        session: the attempt's parameters.
        cohort: the clients of the attempt.
        identities: their long-lived keys.
        silent: the stage (of ``availability.STAGES``) from which on a client says nothing more.
        entropy: source of the clients' keys and seeds.

    Raises:
        ProtocolError: if the cohort is larger than declared, or (in ``open`` and ``close``) too few clients answer.
    """

    def __init__(
        self,
        session: Session,
        cohort: Sequence[int],
        identities: Identities,
        silent: Mapping[int, str] | None = None,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self.server = SecureServer(session, cohort, identities)
        self.silent = dict(silent or {})
        self._clients = {client: SecureClient(session, client, identities.of(client), identities, entropy) for client in cohort}
        self._inboxes: dict[int, bytes] = {}

    def open(self) -> tuple[int, ...]:
        """Run the stages before training and return the clients that are still there."""
        for client in self._answering("advertise_keys", self._clients):
            self.server.collect_keys(client, self._clients[client].advertise())
        roster = self.server.roster()
        here = [client for client in self._clients if self.silent.get(client) != "advertise_keys"]
        for client in self._answering("share_keys", here):
            self.server.collect_shares(client, self._clients[client].share(roster))
        sharers = self.server.sharers()
        self._inboxes = {client: self.server.inbox(client) for client in sharers}
        return sharers

    def send(self, client: int, code: np.ndarray, weight: int = 1) -> bytes:
        """Return what a client sends of its code: the client's side.

        Raises:
            MessageError: if the client has fallen silent.
            ProtocolError: if the code or the weight is not what was declared.
        """
        if client not in self._inboxes:
            raise MessageError("it fell silent before it had sent its code")
        if self.silent.get(client) == "train":
            del self._inboxes[client]
            raise MessageError("it fell silent before it had sent its code")
        return self._clients[client].masked_code(self._inboxes.pop(client), code, weight)

    def receive(self, client: int, message: bytes) -> None:
        """Add a masked code to the sum: the server's side."""
        self.server.collect_masked(client, message)

    def close(self) -> tuple[np.ndarray, int]:
        """Run the stages after training and return (sum of ``weight * code``, sum of weights) of the survivors."""
        server = self.server
        survivors = server.survivor_list()
        signers = self._answering("consistency_check", sorted(server.survivors))
        for client in signers:
            server.collect_signature(client, self._clients[client].consistency(survivors))
        request = server.request()
        for client in self._answering("unmasking", signers):
            server.collect_unmasking(client, self._clients[client].unmask(request))
        return server.total()

    def _answering(self, stage: str, clients: Sequence[int] | Mapping[int, object]) -> list[int]:
        return [client for client in clients if self.silent.get(client) != stage]
