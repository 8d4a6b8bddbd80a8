"""What clients keep to themselves between rounds: error feedback, personal layers."""

from __future__ import annotations

import copy
from typing import Any

from fedlight.core.codec import State


class ClientStore:
    """Client state by client id. A draft of a round is committed only if the round succeeds, so a repeated round starts clean."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self._draft: dict[int, State] = {}

    def draft(self, client: int) -> State:
        """Return the state that the client may change in this attempt: a copy of what it kept."""
        if client not in self._draft:
            kept = self._states.get(client)
            self._draft[client] = copy.deepcopy(kept) if kept else {}
        return self._draft[client]

    def peek(self, client: int) -> State:
        """Return the state that the client kept, to be read only."""
        return self._states.get(client, {})

    def drop(self, client: int) -> None:
        """Forget what a client changed in this attempt."""
        self._draft.pop(client, None)

    def discard(self) -> None:
        """Forget the attempt."""
        self._draft = {}

    def take_draft(self) -> dict[int, State]:
        """Return the states of the attempt that hold something, or did before, and forget the attempt."""
        taken = {client: state for client, state in self._draft.items() if _holds_something(state) or client in self._states}
        self._draft = {}
        return taken

    def commit(self, states: dict[int, State]) -> None:
        """Keep these states."""
        self._states.update(states)

    def forget(self, key: str) -> None:
        """Forget this part of what every client kept."""
        for state in self._states.values():
            state.pop(key, None)

    def state_dict(self) -> dict[int, State]:
        """Return all kept states."""
        return self._states

    def load_state_dict(self, states: dict[int, State]) -> None:
        """Replace all kept states."""
        self._states = dict(states)


def _holds_something(state: Any) -> bool:
    return any(map(_holds_something, state.values())) if isinstance(state, dict) else True
