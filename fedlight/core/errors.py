"""The errors that fedlight raises on purpose."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """An argument that cannot work: the message names it, what was expected, what came and the way out."""


class DataError(ValueError):
    """Data on file that is missing, corrupt or inconsistent."""


class CodecMismatchError(ValueError):
    """A codec that was built or trained for another model."""


class MessageError(ValueError):
    """A client message that is truncated, oversized or meant for another codec or round."""


class ProtocolError(MessageError):
    """Something in a secure aggregation that must not be: whoever sees it stops there and reveals nothing."""


class RoundFailedError(RuntimeError):
    """No client of a cohort could be used, and repeating the round did not help."""


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"Expected `{name}` to be one of {', '.join(choices)} but got {value!r}")
