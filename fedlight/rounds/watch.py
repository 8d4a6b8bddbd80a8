"""What follows a round from outside: callbacks, a profiler, nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from fedlight.core.codec import Context

if TYPE_CHECKING:
    from fedlight.rounds.call import Call
    from fedlight.rounds.messages import ClientUpdate, Reply

T = TypeVar("T")

_UNTIMED: AbstractContextManager[None] = nullcontext()


class Watch:
    """Sees what happens in a round; this one does nothing. A hook may change what it is given; a ``MessageError`` drops the client."""

    def section(self, step: str) -> AbstractContextManager[object]:
        """Return what to run a ``step`` of a round in, such as a profiler's section. Entered once a client or less often."""
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

    def on_round_start(self, call: Call) -> None:
        """Called before the first request of every pass."""

    def on_client_update(self, context: Context, update: ClientUpdate) -> None:
        """Called on the client's side before the update is encoded."""

    def on_client_message(self, call: Call, reply: Reply) -> None:
        """Called on the server's side when a code has arrived."""

    def on_cohort_end(self, call: Call) -> None:
        """Called when the sum of a pass has been decoded."""

    def on_round_end(self, call: Call) -> None:
        """Called when the server has taken its step."""
