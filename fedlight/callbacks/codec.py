"""The callbacks of a codec: the pair that intercepts updates and the sum of their codes, pretraining, and refreshing."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fedlight.callbacks.base import FederatedCallback, FederatedRun, section
from fedlight.core.codec import Codec, exactly
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.rounds.call import Call
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
        """Refuse a Trainer that has not exactly one encoder and one decoder, both of this codec."""
        for kind in (GradientEncoder, GradientDecoder):
            found = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
            if len(found) != 1 or found[0].codec is not self.codec:
                raise ConfigurationError(
                    f"Expected one GradientEncoder and one GradientDecoder that share one codec but got {len(found)} of {kind.__name__} "
                    f"for this codec: use `codec_callbacks(codec)`, or set `model.codec` and list neither under `trainer.callbacks`"
                )
        if not hasattr(pl_module, "server_state"):
            raise ConfigurationError(
                f"Expected a FederatedModule but got {type(pl_module).__name__}, which runs no federated rounds: "
                "use `fedlight.federate(module, data)`, or GradientCodes(codec) to encode its data-parallel gradients"
            )
        if cast("FederatedRun", pl_module).codec is not self.codec:
            raise ConfigurationError(
                f"Expected the module's own codec but got a GradientEncoder and a GradientDecoder of another {type(self.codec).__name__}: "
                "set `model.codec` and list neither under `trainer.callbacks`"
            )


class GradientEncoder(_CodecCallback):
    """Provides the client side of a round with its encoding step: every client's update becomes a code.

    Override ``encode`` to intercept it; what leaves the client is made of the code alone.
    """

    encode = staticmethod(encode_update)


class GradientDecoder(_CodecCallback):
    """Provides the server side of a round with its decoding step: the mean of the cohort's codes becomes the aggregated update.

    Override ``decode`` to intercept it, once a pass.
    """

    decode = staticmethod(decode_mean)


def codec_callbacks(codec: Codec) -> tuple[GradientEncoder, GradientDecoder]:
    """Return the pair of callbacks of one codec."""
    return GradientEncoder(codec), GradientDecoder(codec)


_FEWEST_ROUNDS, _FEW_STEPS = 6, 10
"""What a `fast_dev_run` records and trains: the least that is possible, and a few steps."""


class CodecPretraining(Callback):
    """Records updates on proxy data and trains the module's codec on them before round 0.

    Nothing happens if the codec needs no training, was given trained, or comes from a checkpoint. A `fast_dev_run` records 6 rounds and
    trains 10 steps at most. Under several processes rank 0 trains and broadcasts.

    Args:
        proxy: How updates are recorded.
        training: How a codec with trainable layers is trained on them.
    """

    def __init__(self, proxy: ProxyFederation | None = None, training: CodecTraining | None = None) -> None:
        self.proxy = proxy or ProxyFederation()
        self.training = training or CodecTraining()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ``ConfigurationError`` if the codec cannot be made for the model, ``CodecMismatchError`` if it was trained for another."""
        if stage != "fit":
            return
        module = cast("FederatedRun", pl_module)
        module.build(stage)
        codec = module.codec
        if codec.layout is not None:
            codec.layout.require_same(module.upload_layout, f"The {type(codec).__name__} given")
            return
        codec.bind(module.upload_layout)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the codec if need be, on rank 0, and send it to all; raises ``ConfigurationError`` if there is no proxy data to do so."""
        module = cast("FederatedRun", pl_module)
        if not module.codec.fitted:
            proxy, training = self.proxy, self.training
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                proxy = replace(proxy, rounds=min(proxy.rounds, _FEWEST_ROUNDS), trajectories=1)
                training = replace(training, steps=min(training.steps, _FEW_STEPS), check_every=min(training.check_every, _FEW_STEPS))
            with section(trainer, "pretraining"):
                module.pretrain(proxy, training)


class CodecRefresh(FederatedCallback):
    """Fits the codec anew on proxy updates recorded from the current global model: directions that were worth sending change.

    The new encoder has the next version, so every client that takes part afterwards downloads it, and those bytes are counted. What the
    server remembered of the old codec's scale (its gain), and clients of what it left out, is in the old codec's coordinates: both
    begin anew. Under several processes rank 0 fits and broadcasts. A resumed run refreshes in the same rounds as one that was never
    stopped.

    Args:
        every_n_rounds: Rounds between refreshes.
        proxy: How updates are recorded; 10 rounds if not given. More rounds in several trajectories make a better code, and cost the server
            as many rounds of training.
        training: How a codec with trainable layers is trained on them.
        growth: If given, a due refresh takes place only where the error on the newly recorded updates has grown by this factor since the
            last fit; the others cost the recording alone.
        stop_after: Last round in which a refresh may take place (to the end of the run if not given).
        history: How many of the last decoded aggregates the codec is fitted to beside the recorded updates. They tell what real clients
            send, as far as the old codec let it through: worth having where proxy data are of another kind, or made up. The server keeps
            them, as long as the model each, also in the checkpoint.

    Raises:
        ConfigurationError: if a number is out of range, the module's codec does not learn from updates, or there is no proxy data.
    """

    def __init__(
        self,
        every_n_rounds: int = 20,
        proxy: ProxyFederation | None = None,
        training: CodecTraining | None = None,
        growth: float | None = None,
        stop_after: int | None = None,
        history: int = 0,
    ) -> None:
        require(history >= 0, f"Expected `history` >= 0 but got {history}")
        for name, value in (("every_n_rounds", every_n_rounds), ("growth", growth), ("stop_after", stop_after)):
            require(value is None or value >= 1, f"Expected `{name}` >= 1 but got {value}")
        self.every_n_rounds = every_n_rounds
        self.proxy = proxy or ProxyFederation(rounds=10)
        self.training = training or CodecTraining(steps=300)
        self.growth = growth
        self.stop_after = stop_after
        self.history = history
        self._aggregates: deque[Tensor] = deque(maxlen=history)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a codec that has nothing to fit."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "pretrain"):
            raise ConfigurationError(
                f"Expected a FederatedModule but got {type(pl_module).__name__}, which has no codec: "
                "remove CodecRefresh from `trainer.callbacks`"
            )
        module = cast("FederatedRun", pl_module)
        if not module.codec.needs_fit:
            raise ConfigurationError(
                f"Expected a codec that learns from updates but {type(module.codec).__name__} does not: "
                "remove CodecRefresh from `trainer.callbacks`"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that the codec could not be fitted on: a module's own are there only after its set-up, which follows callbacks'."""
        if cast("FederatedRun", pl_module).data.proxy is None:
            raise ConfigurationError(
                "Expected proxy data to refresh the codec on but there is none: raise `data.proxy_samples`, set `data.proxy_source`, or "
                "remove CodecRefresh from `trainer.callbacks`"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refresh before the round, where one is due."""
        number = trainer.global_step
        if not number or number % self.every_n_rounds or (self.stop_after is not None and number > self.stop_after):
            return
        module = cast("FederatedRun", pl_module)
        version = module.codec.version
        history = torch.stack([*self._aggregates]) if self._aggregates else None
        with section(trainer, "refresh"):
            module.pretrain(self.proxy, self.training, first_round=number, growth=self.growth, history=history)
        if module.codec.version > version:
            module.server_state.decoder = {}
            module.store.forget("codec")

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Keep what the server knows of the cohort's mean update, the last first."""
        if self.history:
            assert round.aggregate is not None
            module = cast("FederatedRun", pl_module)
            with exactly(module.device):
                seen = module.codec.decoder.observe(round.codes.mean(), round.context, round.aggregate)
            self._aggregates.appendleft(seen.float().cpu().clone())

    def state_dict(self) -> dict[str, Any]:
        """Return the aggregates that were kept."""
        return {"history": torch.stack([*self._aggregates])} if self._aggregates else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._aggregates = deque(state_dict.get("history", ()), maxlen=self.history)
