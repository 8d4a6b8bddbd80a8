"""What clients keep between rounds and never send: error feedback, control variates, personal layers and models."""

from __future__ import annotations

import copy
from typing import Any

from fedlight.clients.shelf import Shelf
from fedlight.core.codec import State


class ClientStore:
    """Client state by client id. A round's draft is committed only if the round succeeds, so a repeated round starts clean.

    Args:
        in_memory_mb: MiB of states in memory; beyond that the oldest ones are in temporary files.
    """

    def __init__(self, in_memory_mb: float = 1024.0) -> None:
        self._in_memory_mb = in_memory_mb
        self._states = Shelf(in_memory_mb)
        self._draft: dict[int, State] = {}

    def draft(self, client: int) -> State:
        """Return a copy of the client's state, for the client to change in this attempt."""
        if client not in self._draft:
            kept = self._states.get(client)
            self._draft[client] = copy.deepcopy(kept) if kept else {}
        return self._draft[client]

    def peek(self, client: int) -> State:
        """Return the client's stored state; read it only."""
        return self._states.get(client, {})

    def drop(self, client: int) -> None:
        """Discard a client's changes in this attempt."""
        self._draft.pop(client, None)

    def discard(self) -> None:
        """Discard the attempt."""
        self._draft = {}

    def take_draft(self) -> dict[int, State]:
        """Return the attempt's states that are not empty, or were not before, and discard the attempt."""
        taken = {client: state for client, state in self._draft.items() if _holds_something(state) or client in self._states}
        self._draft = {}
        return taken

    def commit(self, states: dict[int, State]) -> None:
        """Store these states."""
        self._states.update(states)

    def forget(self, key: str) -> None:
        """Delete this part of every client's state."""
        for client in list(self._states):
            state = self._states[client]
            if key in state:
                self._states[client] = {name: part for name, part in state.items() if name != key}

    def state_dict(self) -> dict[int, State]:
        """Return all stored states; those in files are mapped into memory."""
        return dict(self._states)

    def load_state_dict(self, states: dict[int, State]) -> None:
        """Replace all stored states."""
        self._states = Shelf(self._in_memory_mb)
        self._states.update(states)


def _holds_something(state: Any) -> bool:
    return any(map(_holds_something, state.values())) if isinstance(state, dict) else True
