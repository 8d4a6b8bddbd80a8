"""The errors that fedlight raises on purpose."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """An invalid argument: the message names it, what was expected, what came, and how to fix it."""


class DataError(ValueError):
    """A data file that is missing, corrupt or inconsistent."""


class CodecMismatchError(ValueError):
    """A codec that was built or trained for another model."""


class MessageError(ValueError):
    """A client message that is truncated, oversized or meant for another codec or round."""


class ProtocolError(MessageError):
    """A violation of the secure aggregation protocol: the side that detects it stops and reveals nothing."""


class RoundFailedError(RuntimeError):
    """No attempt at a round had enough usable clients."""


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"Expected `{name}` to be one of {', '.join(choices)} but got {value!r}")
