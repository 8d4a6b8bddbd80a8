"""What a use of codes needs of a codec, refused in a sentence before training starts."""

from __future__ import annotations

from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError


def require_additive(codec: Codec, why: str) -> None:
    """Raise ``ConfigurationError`` unless the codec's codes can be summed, which ``why`` needs (such as "secure aggregation")."""
    if not codec.additive:
        raise ConfigurationError(
            f"Expected a codec whose codes can be summed, which {why} needs, but the server must decode every message of "
            f"{type(codec).__name__} by itself: choose an additive codec, such as LinearCodec followed by QuantizeCodec"
        )


def require_fixed_width(codec: Codec, why: str) -> None:
    """Raise ``ConfigurationError`` unless the codec's messages have one length, which ``why`` needs (such as "secure aggregation")."""
    if not codec.fixed_width:
        raise ConfigurationError(
            f"Expected a codec whose messages have one length, which {why} needs, but those of {type(codec).__name__} are entropy-coded: "
            "choose TransformCodec, or QuantizeCodec in the place of EntropyCodec"
        )


def require_room(codec: Codec, why: str) -> None:
    """Raise ``ConfigurationError`` unless masked sums of the codec have room for whatever is declared, which ``why`` needs."""
    if codec.most_clients:
        raise ConfigurationError(
            f"Expected a codec whose sums have room for any codes, which {why} needs, but {type(codec).__name__} makes windows for its "
            "codes as they are: choose TransformCodec, or QuantizeCodec in the place of WindowCodec"
        )
