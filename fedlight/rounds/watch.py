"""What follows the clients' side of a round from outside: callbacks, a profiler, nothing. The server's side: ``rounds.call.Watch``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from fedlight.core.codec import Context
from fedlight.rounds.messages import ClientUpdate

T = TypeVar("T")

_UNTIMED: AbstractContextManager[None] = nullcontext()


class ClientWatch:
    """Sees what happens on the clients' side of a round; this one does nothing. A ``MessageError`` drops the client."""

    def section(self, step: str) -> AbstractContextManager[object]:
        """Return what to run a ``step`` of a round in, such as a profiler's section. Entered at most once per client."""
        return _UNTIMED

    def each_in_section(self, step: str, items: Iterable[T]) -> Iterator[T]:
        """Yield items, each made in a section: once for every item, and once for the end."""
        work = iter(items)
        while True:
            with self.section(step):
                try:
                    item = next(work)
                except StopIteration:
                    return
            yield item

    def on_client_update(self, context: Context, update: ClientUpdate) -> None:
        """Called on the client's side before the update is encoded."""
