"""The pair of callbacks that intercepts clients' updates and the sum of their codes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from fedlight.callbacks.base import FederatedCallback
from fedlight.core.codec import Codec, Context, Private, ServerContext, State
from fedlight.core.cores import spare_cores
from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator
from fedlight.core.rounds import Round, Upload
from fedlight.core.wire import Message, saturation

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule
    from fedlight.privacy import PrivacyMechanism

TRIES = 3
WORTH_A_THREAD = 1e-3  # seconds: handing a message over costs some 0.2 ms, and small models' training more where it shares the interpreter


class _CodecHalf(FederatedCallback):
    """What both halves share: the codec, and that neither works without the other."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer without the other half."""
        require_pair(trainer, pl_module, self.codec)


class GradientEncoder(_CodecHalf):
    """Encodes every client's update into the message that the client sends: the client side of a round.

    Args:
        codec: the codec, shared with the `GradientDecoder` of the same Trainer.
        beside: whether a thread of its own encodes while the next client trains, with the same messages. If not given, it does on a CPU
            with a core to spare, where clients train one by one and encoding each of the first three took `WORTH_A_THREAD` seconds or more.

    Raises:
        ConfigurationError: if the Trainer has no matching decoder, or the module runs no federated rounds.
    """

    def __init__(self, codec: Codec, beside: bool | None = None) -> None:
        super().__init__(codec)
        self.beside = beside
        self._thread: ThreadPoolExecutor | None = None
        self._tries: list[float] = []  # seconds that encoding the first clients took

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get a thread ready, where there is a core for it."""
        idle = pl_module.device.type == "cpu" and spare_cores(trainer.num_devices) >= trainer.num_devices
        fits = idle and cast("FederatedModule", pl_module).engine.one_by_one
        if fits if self.beside is None else self.beside:
            self._thread = ThreadPoolExecutor(1, "fedlight-encode", torch.set_num_threads, (torch.get_num_threads(),))
        self._tries = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the thread."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the thread."""
        self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def on_client_update(self, trainer: Trainer, pl_module: FederatedModule, round: Round, upload: Upload) -> None:  # type: ignore[override]
        """Set the client's message, or have it encoded beside what follows."""
        context = round.context
        generator = torch_generator(context.seed, context.round, context.attempt, upload.client, "encode", context.step)
        private = Private(generator, pl_module.store.draft(upload.client).setdefault("codec", {}))
        if self._thread is not None and self._worth_a_thread(context.step):
            upload.expect(self._thread.submit(self._encode, pl_module.privacy, upload, context, private))
            return
        begin = time.perf_counter()
        upload.message = self._encode(pl_module.privacy, upload, context, private)
        if len(self._tries) < TRIES:
            self._tries.append(time.perf_counter() - begin)

    def _worth_a_thread(self, step: int) -> bool:
        if self.beside:
            return True
        return step == 0 and len(self._tries) == TRIES and min(self._tries) >= WORTH_A_THREAD  # nobody trains in later passes

    def _encode(self, privacy: PrivacyMechanism | None, upload: Upload, context: Context, private: Private) -> Message:
        """Return the client's message; touches nothing but what is this client's, for the next one may be in training."""
        encoder = self.codec.encoder
        with exactly(upload.update.device):
            if privacy is None:
                return encoder.encode_message(upload.update.float(), context, private)
            update = upload.update.float() if upload.usable else torch.zeros_like(upload.update, dtype=torch.float32)
            protection = privacy.protection(encoder, context, private, upload.client, silent=not upload.usable)
            message = encoder.encode_message(update, context, private, protection)
            upload.inside = protection.inside if privacy.sends_bits else None
            return message


class GradientDecoder(_CodecHalf):
    """Adds up the clients' codes and decodes their sum, once, into the aggregated update: the server side of a round.

    Args:
        codec: the codec, shared with the `GradientEncoder` of the same Trainer.

    Raises:
        ConfigurationError: if the Trainer has no matching encoder, or the module runs no federated rounds.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        self.server_state: State = {}
        self._draft: State = {}

    def on_round_start(self, trainer: Trainer, pl_module: LightningModule, round: Round) -> None:
        """Announce what every client has to know before it encodes: a gain, or the previous pass's result."""
        if round.context.step == 0:
            # What decoding changes is kept only if the round succeeds.
            self._draft = copy.deepcopy(self.server_state)
        broadcast = dict(self.codec.decoder.broadcast(self._draft))
        privacy = cast("FederatedModule", pl_module).privacy
        if privacy is not None:
            broadcast |= privacy.broadcast()
        if round.aggregate is not None:
            broadcast["reply"] = round.aggregate
        round.context = replace(round.context, broadcast=broadcast)

    def on_client_message(self, trainer: Trainer, pl_module: LightningModule, round: Round, upload: Upload) -> None:
        """Have the aggregator take one client's message into account: add its code to the running sum."""
        aggregator = cast("FederatedModule", pl_module).aggregator
        with exactly(pl_module.device):
            term = aggregator.arrive(round, upload, self.codec.decoder, pl_module.device)
        if term is not None and round.true is not None and self.codec.additive:
            round.saturation.append(saturation(term, self.codec.decoder.format_at(round.context.step)))

    def on_cohort_end(self, trainer: Trainer, pl_module: LightningModule, round: Round) -> None:
        """Decode the cohort's sum."""
        context = ServerContext.of(round.context, round.codes.effective_count, getattr(round.context, "noise", 0))
        with exactly(pl_module.device):
            round.aggregate = self.codec.decoder.decode(round.codes.mean(), context, self._draft)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Round) -> None:
        """Keep the server's state of the round that succeeded."""
        self.server_state = self._draft

    def state_dict(self) -> State:
        """Return the server's own codec state (gain, residual) for the checkpoint."""
        return self.server_state

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what ``state_dict`` returned."""
        self.server_state = dict(state_dict)


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Run without gradients and in full precision, whatever the Trainer's: codecs are fitted and their laws hold in float32."""
    # Entering `autocast` for every message where there is none would cost more than the message.
    return _without_autocast(device) if torch.is_autocast_enabled(device.type) else torch.no_grad()


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


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
    if not hasattr(pl_module, "store"):
        raise ConfigurationError(
            f"Expected a FederatedModule but got {type(pl_module).__name__}, which runs no federated rounds: "
            "use `fedlight.federate(module, data)`, or GradientCodes(codec) to encode its data-parallel gradients"
        )
    if cast("FederatedModule", pl_module).codec is not codec:
        raise ConfigurationError(
            f"Expected the module's own codec but got a GradientEncoder and a GradientDecoder of another {type(codec).__name__}: "
            "set `model.codec` and list neither under `trainer.callbacks`"
        )
