"""What clients keep between rounds and never send: error feedback, control variates, personal layers and models."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from fedlight.clients.shelf import Shelf
from fedlight.core.codec import Key, State


class ClientStore:
    """Client state by client id. What a client changes in an attempt is a draft, kept only if the attempt counts.

    Args:
        in_memory_mb: MiB of states in memory; beyond that the oldest ones are in temporary files.
    """

    def __init__(self, in_memory_mb: float = 1024.0) -> None:
        self._in_memory_mb = in_memory_mb
        self._states = Shelf(in_memory_mb)
        self._draft: dict[int, State] = {}
        self._keys: dict[int, Key] = {}  # the attempt that a client's draft belongs to

    def begin(self, client: int, key: Key, settled: Key | None) -> None:
        """Begin an attempt of a client; its draft of an earlier one is kept if that was the last that counted (``settled``)."""
        if self._keys.get(client, key) != key:
            if self._keys[client] == settled:
                self.commit({client: self._draft.pop(client, {})})
            self.drop(client)
        self._keys[client] = key

    def draft(self, client: int) -> State:
        """Return a copy of the client's state, for the client to change in this attempt."""
        if client not in self._draft:
            kept = self._states.get(client)
            self._draft[client] = copy.deepcopy(kept) if kept else {}
        return self._draft[client]

    def peek(self, client: int, settled: Key | None = None) -> State:
        """Return the client's state after its last attempt that counted (``settled``), were it a draft yet; read it only."""
        if settled is not None and self._keys.get(client) == settled and client in self._draft:
            return self._draft[client]
        return self._states.get(client, {})

    def drop(self, client: int) -> None:
        """Discard a client's changes in this attempt."""
        self._draft.pop(client, None)

    def take_draft(self, clients: Collection[int]) -> dict[int, State]:
        """Return what these clients changed, where it holds something, or did before, and forget all changes of the attempt."""
        draft, self._draft, self._keys = self._draft, {}, {}
        return {client: state for client, state in draft.items() if client in clients and self._matters(client, state)}

    def commit(self, states: dict[int, State]) -> None:
        """Keep these states."""
        self._states.update({client: state for client, state in states.items() if self._matters(client, state)})

    def forget(self, key: str) -> None:
        """Delete this part of every client's state."""
        for client in list(self._states):
            state = self._states[client]
            if key in state:
                self._states[client] = {name: part for name, part in state.items() if name != key}

    def state_dict(self) -> dict[str, Any]:
        """Return all kept states, those in files mapped into memory, and drafts of which nobody knows yet whether they count."""
        drafts = {client: (self._keys[client], state) for client, state in self._draft.items() if client in self._keys}
        return {"kept": dict(self._states), "drafts": drafts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything."""
        self._states = Shelf(self._in_memory_mb)
        self._states.update(state["kept"])
        self._draft = {client: own for client, (_, own) in state["drafts"].items()}
        self._keys = {client: (key[0], key[1]) for client, (key, _) in state["drafts"].items()}

    def _matters(self, client: int, state: State) -> bool:
        return _holds_something(state) or client in self._states


def _holds_something(state: Any) -> bool:
    return any(map(_holds_something, state.values())) if isinstance(state, dict) else True
