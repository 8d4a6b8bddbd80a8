"""What a FederatedModule makes of the parts that it is given: those that do not go together are refused at once."""

from __future__ import annotations

from pathlib import Path

from fedlight.clients.algorithms import Algorithm
from fedlight.codecs.identity import IdentityCodec
from fedlight.codecs.stacked import StackedCodec
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import load_codec
from fedlight.modules.privacy import private_codec
from fedlight.privacy import PrivacyMechanism


def chosen_codec(codec: Codec | None, path: str | None, privacy: PrivacyMechanism | None) -> Codec:
    """Return the trained codec at ``path``, else the configured one on the grid that privacy needs, else that of plain updates.

    Raises:
        ConfigurationError: if there are both and they differ, or the mechanism cannot protect the codec's codes.
    """
    codec = private_codec(codec, privacy) if codec or not path else codec
    if not path:
        return codec or IdentityCodec()
    trained = load_codec(Path(path))
    if codec and codec.config() != trained.config():
        raise ConfigurationError(
            f"Expected the codec at {path!r} to be the configured {codec.config()} but it is {trained.config()}: leave one out"
        )
    return trained


def check_algorithm(algorithm: Algorithm, batch_norm: str, privacy: PrivacyMechanism | None) -> None:
    """Raise ``ConfigurationError`` if local training does not go with local BatchNorm layers, or with privacy."""
    if batch_norm == "local" and algorithm.shared:
        raise ConfigurationError(
            f"Expected `batch_norm` mean with {type(algorithm).__name__}, whose correction pulls all weights to common ones, "
            "but got local: choose FedAvg or another `algorithm`"
        )
    if uploads_more(algorithm) and privacy is not None:
        raise ConfigurationError(
            f"Expected no `privacy` with {type(algorithm).__name__}, whose clients upload more than the update, which alone is "
            f"clipped and noised, but got {type(privacy).__name__}: choose FedAvg or another `algorithm` of one vector"
        )


def upload_codec(codec: Codec, algorithm: Algorithm) -> Codec:
    """Return the codec of all that clients upload: of the update, and of what else the algorithm needs the mean of."""
    if not uploads_more(algorithm) or isinstance(codec, StackedCodec):
        return codec
    return StackedCodec(codec, algorithm.vectors, algorithm.scalars)


def uploads_more(algorithm: Algorithm) -> bool:
    """Whether clients upload more than the update."""
    return algorithm.vectors > 1 or algorithm.scalars > 0
