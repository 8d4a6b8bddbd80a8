"""Full precision, whatever a process trains in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Run without gradients and in full precision, whatever the process trains in: codecs' laws hold in float32."""
    # Entering `autocast` for every message where there is none would cost more than the message.
    return _without_autocast(device) if torch.is_autocast_enabled(device.type) else torch.no_grad()


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
