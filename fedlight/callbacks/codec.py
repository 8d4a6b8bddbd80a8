"""The pair of callbacks that intercepts clients' updates and the sum of their codes."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fedlight.callbacks.base import FederatedCallback, FederatedRun
from fedlight.core.codec import Codec, Context, Decoder, Encoder, Private, State
from fedlight.core.errors import ConfigurationError
from fedlight.rounds.host import encode_update
from fedlight.rounds.server import decode_mean


class _CodecCallback(FederatedCallback):
    """What encoder and decoder share: the codec, and that neither works without the other.

    Args:
        codec: the codec, shared with the other one in the same Trainer.

    Raises:
        ConfigurationError: if the Trainer has no matching other one, or the module runs no federated rounds.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer without the other one."""
        require_pair(trainer, pl_module, self.codec)


class GradientEncoder(_CodecCallback):
    """Provides the client side of a round with its encoding step: every client's update becomes a code."""

    def encode(self, encoder: Encoder, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the code ``[code_dim]`` of an update ``[dim]``; what leaves the client is made of the code alone."""
        return encode_update(encoder, update, context, private)


class GradientDecoder(_CodecCallback):
    """Provides the server side of a round with its decoding step: the mean of the cohort's codes becomes the aggregated update."""

    def decode(self, decoder: Decoder, mean: Tensor, context: Context, state: State) -> Tensor:
        """Return the aggregated update ``[dim]`` of a mean code ``[code_dim]``, once a pass; ``state`` is the server's."""
        return decode_mean(decoder, mean, context, state)


def codec_callbacks(codec: Codec) -> tuple[GradientEncoder, GradientDecoder]:
    """Return the pair of callbacks of one codec."""
    return GradientEncoder(codec), GradientDecoder(codec)


def require_pair(trainer: Trainer, pl_module: LightningModule, codec: Codec) -> None:
    """Raise ``ConfigurationError`` unless the Trainer has exactly one encoder and one decoder, both of this codec."""
    for kind in (GradientEncoder, GradientDecoder):
        found = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
        if len(found) != 1 or found[0].codec is not codec:
            raise ConfigurationError(
                f"Expected one GradientEncoder and one GradientDecoder that share one codec but got {len(found)} of {kind.__name__} for "
                f"this codec: use `codec_callbacks(codec)`, or set `model.codec` and list neither under `trainer.callbacks`"
            )
    if not hasattr(pl_module, "server_state"):
        raise ConfigurationError(
            f"Expected a FederatedModule but got {type(pl_module).__name__}, which runs no federated rounds: "
            "use `fedlight.federate(module, data)`, or GradientCodes(codec) to encode its data-parallel gradients"
        )
    if cast("FederatedRun", pl_module).codec is not codec:
        raise ConfigurationError(
            f"Expected the module's own codec but got a GradientEncoder and a GradientDecoder of another {type(codec).__name__}: "
            "set `model.codec` and list neither under `trainer.callbacks`"
        )
