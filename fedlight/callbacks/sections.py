"""The steps of a round by name, for the Trainer's profiler: `--trainer.profiler simple` says how long each of them took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import PassThroughProfiler

T = TypeVar("T")

_UNTIMED: AbstractContextManager[None] = nullcontext()


def section(trainer: Trainer, step: str) -> AbstractContextManager[object]:
    """Return what to run a ``step`` of a round in, so that the Trainer's profiler lists it as ``[Round]<step>``.

    Entered once a client or less often, never for a local step: without a profiler it costs a look at the Trainer.
    """
    profiler = trainer.profiler  # type: ignore[attr-defined]
    return _UNTIMED if type(profiler) is PassThroughProfiler else profiler.profile(f"[Round]{step}")


def each_in_section(trainer: Trainer, step: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items of an iterable that does its work when asked for the next: once in a section for every item, and once for the end."""
    work = iter(items)
    while True:
        with section(trainer, step):
            try:
                item = next(work)
            except StopIteration:
                return
        yield item
