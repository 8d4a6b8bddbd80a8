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


def own_error(error: BaseException | None) -> Exception | None:
    """Return the error of fedlight's that lies behind one, or None: jsonargparse raises others in place of those of nested classes."""
    while error is not None:
        if isinstance(error, (ConfigurationError, DataError, CodecMismatchError, RoundFailedError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is one of ``choices``."""
    require(value in choices, f"Expected `{name}` to be one of {', '.join(choices)} but got {value!r}")


def require(condition: object, message: str) -> None:
    """Raise ``ConfigurationError`` with this message unless the condition holds."""
    if not condition:
        raise ConfigurationError(message)


def require_counts(**counts: int) -> None:
    """Raise ``ConfigurationError`` unless every number is at least 1."""
    for name, count in counts.items():
        require(count >= 1, f"Expected `{name}` >= 1 but got {count}")


def require_least(options: object, **least: float) -> None:
    """Raise ``ConfigurationError`` unless these options, attributes of an object, are as large as that at least, or None."""
    for name, bound in least.items():
        value = getattr(options, name)
        require(value is None or value >= bound, f"Expected `{name}` >= {bound} but got {value}")
