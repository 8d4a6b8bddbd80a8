"""Identity keys of simulated clients; in a deployment each lies with its client, and the public ones are known beforehand."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping

from fedlight.aggregation.secure.primitives import KEY, Identity


class Identities(Mapping[int, bytes]):
    """Simulated clients' long-lived keys, made when first needed and kept in memory: a directory of public keys (32 bytes) by client."""

    def __init__(self, entropy: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._entropy = entropy
        self._keys: dict[int, Identity] = {}

    def of(self, client: int) -> Identity:
        """Return a client's key."""
        if client not in self._keys:
            self._keys[client] = Identity(self._entropy(KEY))
        return self._keys[client]

    def __getitem__(self, client: int) -> bytes:
        return self.of(client).public

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
