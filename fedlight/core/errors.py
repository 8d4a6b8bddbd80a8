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


class LocalTrainingError(RuntimeError):
    """A client's training stopped with an exception: the message names client, round and step, and says it in its own words."""


class RoundFailedError(RuntimeError):
    """No attempt at a round had enough usable clients."""


class ProcessLostError(RuntimeError):
    """Another process of the run has ended, or answers no more."""


def own_error(error: BaseException | None) -> Exception | None:
    """Return fedlight's error in an error's chain of causes, or None: jsonargparse replaces the errors of nested classes."""
    seen: set[int] = set()  # a chain can end in itself: errors that are kept and raised again get one another as context
    while error is not None and id(error) not in seen:
        if isinstance(error, (ConfigurationError, DataError, CodecMismatchError, LocalTrainingError, RoundFailedError, ProcessLostError)):
            return error
        seen.add(id(error))
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


def require_positive(**numbers: float | None) -> None:
    """Raise ``ConfigurationError`` unless every number is above 0, or None."""
    for name, number in numbers.items():
        require(number is None or number > 0, f"Expected `{name}` > 0 but got {number}")


def require_least(options: object, **least: float) -> None:
    """Raise ``ConfigurationError`` unless these options, attributes of an object, are at least that large, or None."""
    for name, bound in least.items():
        value = getattr(options, name)
        require(value is None or value >= bound, f"Expected `{name}` >= {bound} but got {value}")
