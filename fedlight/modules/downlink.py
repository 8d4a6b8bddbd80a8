"""What clients download before a round, and what it weighs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import encoder_bytes
from fedlight.core.layout import float_buffers
from fedlight.core.rounds import Round
from fedlight.core.sums import write_sum

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule

SEED_BYTES = 8
"""What the initial model weighs where it is sent as the seed that it is drawn from."""


class Downlink(ABC):
    """Decides what a client that is about to take part downloads; every byte is counted."""

    def __init__(self) -> None:
        self.versions = np.zeros(0, dtype=np.int64)

    def setup(self, module: FederatedModule) -> None:
        """Begin a run; refuses what cannot work with a ``ConfigurationError``."""
        self.versions = np.zeros(module.data.num_population, dtype=np.int64)

    def count(self, module: FederatedModule, round: Round) -> None:
        """Count what the cohort downloads before a pass: the model in some form, what is announced, and missing encoders."""
        broadcast = broadcast_bytes(round.context.broadcast)
        if round.context.step == 0:
            broadcast += broadcast_bytes(round.server)
        module.traffic.add_download(broadcast * len(round.cohort))
        if round.context.step == 0:
            self.bring_up_to_date(module, round.cohort)

    @abstractmethod
    def bring_up_to_date(self, module: FederatedModule, clients: np.ndarray) -> None:
        """Count what these clients download to hold the current model and the current encoder."""

    def finished(self, module: FederatedModule, round: Round, lr: float) -> None:  # noqa: B027 (most have nothing to note)
        """Take note of a round that succeeded, in which the server took a step of learning rate ``lr``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the server remembers of its clients."""
        return {"versions": torch.from_numpy(self.versions.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.versions = state["versions"].numpy().copy()


class FullModel(Downlink):
    """Every client of a cohort downloads the whole model as float32, and the encoder if it lacks the current version."""

    def bring_up_to_date(self, module: FederatedModule, clients: np.ndarray) -> None:
        """Count the model for everyone and the encoder for those that lack it."""
        module.traffic.add_download(model_bytes(module) * len(clients))
        if module.codec.version:
            lacking = clients[self.versions[clients] < module.codec.version]
            if len(lacking):
                module.traffic.add_codec(encoder_bytes(module.codec) * len(lacking))
            self.versions[lacking] = module.codec.version


class CatchUp(Downlink):
    """A client downloads the summed codes of the rounds it missed instead of the model, whenever that is shorter.

    The initial model is a seed, so a client that holds nothing yet has missed every round so far. To take a round's step itself a client
    needs the codec of that round: the encoder, and what the decoder has beyond it, are counted where it lacks them. A client that
    downloads the model needs the current encoder alone, so nobody downloads more than with FullModel. BatchNorm statistics are sent as
    they are. Exact for codecs whose decoding depends on nothing but the code and what is announced, and plain SGD at the
    server: the client ends with the server's model (``fedlight.core.sums.apply_sum``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = np.zeros(0, dtype=np.int64)
        self.decoders = np.zeros(0, dtype=np.int64)
        self.sizes: list[int] = []
        self.used: list[int] = []
        self.codecs: dict[int, tuple[int, int]] = {}

    def setup(self, module: FederatedModule) -> None:
        """Begin a run in which nobody has downloaded anything.

        Raises:
            ConfigurationError: if clients could not take the server's step from the sums.
        """
        super().setup(module)
        codec = module.codec
        if not codec.additive or codec.passes > 1 or not codec.decoder.replayable:
            raise ConfigurationError(
                f"Expected a codec whose sum alone gives the aggregate but {type(codec).__name__} needs more than that: "
                "set `model.downlink` to FullModel"
            )
        optimizer = module.server_optimizer(module.trainable())
        if not module.algorithm.replayable:
            raise ConfigurationError(
                f"Expected an `algorithm` whose server takes the mean update as it is but got {type(module.algorithm).__name__}, whose "
                "steps clients cannot take from sums alone: set `model.downlink` to FullModel"
            )
        plain = type(optimizer) is torch.optim.SGD and not any(
            group[name] for group in optimizer.param_groups for name in ("momentum", "weight_decay", "nesterov", "maximize")
        )
        if not plain or len(optimizer.param_groups) > 1:
            raise ConfigurationError(
                f"Expected plain SGD of one learning rate as `model.server_optimizer` but got {type(optimizer).__name__} with memory, "
                "decay or groups of its own, whose steps clients cannot take from sums alone: set `model.downlink` to FullModel"
            )
        self.held = np.full(module.data.num_population, -1, dtype=np.int64)
        self.decoders = np.zeros_like(self.versions)
        self.sizes = []
        self.used = []
        self.codecs = {0: (0, 0)}

    def bring_up_to_date(self, module: FederatedModule, clients: np.ndarray) -> None:
        """Count for each client the shorter of the two ways."""
        now, current, model = len(self.sizes), module.codec.version, model_bytes(module)
        if current not in self.codecs:
            self.codecs[current] = encoder_bytes(module.codec), beyond_encoder(module.codec)
        buffers = model - 4 * module.layout.dim
        for client in clients.tolist():
            held, version = int(self.held[client]), int(self.versions[client])
            if held == now:  # an attempt at the same round went before
                continue
            missed = range(max(held, 0), now)
            replayed = {self.used[r] for r in missed}
            sums = sum(self.sizes[r] for r in missed) + buffers + (SEED_BYTES if held < 0 else 0)
            encoders = sum(self.codecs[v][0] for v in replayed | {current} if v > version)
            decoders = sum(self.codecs[v][1] for v in replayed if v > self.decoders[client])
            latest = self.codecs[current][0] if current > version else 0
            if sums + encoders + decoders <= model + latest:
                module.traffic.add_download(sums)
                module.traffic.add_codec(encoders + decoders)
                self.decoders[client] = max(replayed, default=self.decoders[client])
            else:
                module.traffic.add_download(model)
                module.traffic.add_codec(latest)
        self.held[clients] = now
        self.versions[clients] = current

    def finished(self, module: FederatedModule, round: Round, lr: float) -> None:
        """Keep the length of the round's sum as a message."""
        self.sizes.append(len(write_sum(round.codes, round.context, module.codec.encoder.fingerprint, lr)))
        self.used.append(module.codec.version)

    def state_dict(self) -> dict[str, Any]:
        """Return what every client holds and what every round and codec weighs."""
        clients = {"held": torch.from_numpy(self.held.copy()), "decoders": torch.from_numpy(self.decoders.copy())}
        return super().state_dict() | clients | {"sizes": self.sizes, "used": self.used, "codecs": self.codecs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.held, self.decoders = state["held"].numpy().copy(), state["decoders"].numpy().copy()
        self.sizes, self.used, self.codecs = list(state["sizes"]), list(state["used"]), dict(state["codecs"])


def model_bytes(module: FederatedModule) -> int:
    """Return what the model weighs as float32, its statistics included."""
    return 4 * (module.layout.dim + sum(buffer.numel() for buffer in float_buffers(module.network)))


def beyond_encoder(codec: Codec) -> int:
    """Return the bytes of the decoder's tensors that the encoder's download does not hold already."""
    known = codec.encoder.state_dict()
    extra = 0
    for name, tensor in codec.decoder.state_dict().items():
        same = name in known and known[name].shape == tensor.shape and bool((known[name] == tensor).all())
        extra += 0 if same else tensor.numel() * tensor.element_size()
    return extra


def broadcast_bytes(broadcast: Mapping[str, Any]) -> int:
    """Return the bytes of what the server announces: tensors at their size, every other number as 8 bytes.

    >>> broadcast_bytes({"gain": 0.5, "0": {"reply": torch.zeros(3)}})
    20
    """
    total = 0
    for value in broadcast.values():
        if isinstance(value, Mapping):
            total += broadcast_bytes(value)
        else:
            total += value.numel() * value.element_size() if isinstance(value, Tensor) else 8
    return total
