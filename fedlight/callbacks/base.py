"""Hooks of a federated round, on top of Lightning's, and what callbacks may ask of the module that runs it, and of its user."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from fedlight.aggregation import Aggregator
from fedlight.clients.algorithms import Algorithm
from fedlight.clients.engine import Engine
from fedlight.clients.local_model import Augment, LocalModel
from fedlight.clients.store import ClientStore
from fedlight.core.codec import Codec, Context
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.data import FederatedDataModule
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds.availability import Availability
from fedlight.rounds.call import Call
from fedlight.rounds.clients import Clients
from fedlight.rounds.downlink import Downlink
from fedlight.rounds.held import HeldModels
from fedlight.rounds.messages import ClientUpdate, Reply
from fedlight.rounds.server import ServerState
from fedlight.rounds.stop import Stop

_UNTIMED: AbstractContextManager[None] = nullcontext()


class FederatedRun(LightningModule, ABC):
    """What a `FederatedModule` is to those who work with one: its arguments, which its docstring explains, and the state of its run."""

    network: nn.Module
    codec: Codec
    codec_path: str | None
    algorithm: Algorithm
    engine: Engine
    loss: nn.Module
    server_optimizer: OptimizerCallable
    server_scheduler: LRSchedulerCallable | None
    privacy: PrivacyMechanism | None
    downlink: Downlink
    aggregator: Aggregator
    clients: Clients | None
    weighting: str
    availability: Availability
    batch_norm: str
    min_clients: int
    max_attempts: int
    sim_every: int
    seed: int

    own_metrics: dict[str, Metric]  # of logits and targets
    own_data: FederatedDataModule | None = None  # for a Trainer that is given no data module
    server_state: ServerState  # what the server remembers from round to round
    store: ClientStore  # what simulated clients keep between rounds
    held: HeldModels  # what they hold of models and codecs, where they download them as bytes
    settings: dict[str, str] | None = None  # what a run is told by, in words (`fedlight.modules.state.fingerprint`)
    stop: Stop  # a request to stop, which processes tell each other of
    codec_error: float | None = None  # on held-out updates when it was fitted, if it was fitted here
    pretrain_seconds: float = 0.0
    train_seconds: float = 0.0  # without those since `_started`
    _started: float | None = None

    @property
    def data(self) -> FederatedDataModule:
        """The Trainer's data module, or what `fedlight.federate` was given."""
        data = getattr(self.trainer, "datamodule", None) or self.own_data
        if not isinstance(data, FederatedDataModule):
            raise ConfigurationError(
                f"Expected a FederatedDataModule but got {type(data).__name__}: pass datamodule=FederatedDataModule(...), for a data "
                "module of your own FederatedDataModule(source=LightningData(yours)), or use `fedlight.federate(module, yours)`"
            )
        return data

    @property
    def own_datamodule(self) -> LightningDataModule | None:
        """The user's own data module, None if the module loads its data itself, or fedlight's data module does."""
        found = getattr(self.data.source, "datamodule", None)
        return found if isinstance(found, LightningDataModule) else None

    @property
    def layout(self) -> Layout:
        """The layout of the global model's trainable parameters."""
        return Layout.of(self.network)

    @property
    def upload_layout(self) -> Layout:
        """The layout of what clients upload: the update, and what else the algorithm needs the mean of."""
        return self.layout.stacked(self.algorithm.vectors, self.algorithm.scalars)

    def seconds_trained(self) -> float:
        """Return the seconds spent in rounds and validation so far, those before a resume included."""
        return self.train_seconds + (time.monotonic() - self._started if self._started is not None else 0.0)

    @abstractmethod
    def build(self, stage: str) -> None:
        """Set up data and network, before anything is told the network's weights; once a fit, however often it is called."""

    @abstractmethod
    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what clients train."""

    @abstractmethod
    def pretrain(
        self,
        proxy: ProxyFederation,
        training: CodecTraining,
        progress: bool | None = None,
        first_round: int = 0,
        growth: float | None = None,
        history: Tensor | None = None,
    ) -> dict[str, float]:
        """Record updates on proxy data, fit the codec to them, and return the figures of the fit."""


class FederatedCallback(Callback):
    """A Lightning callback that also hears of rounds. `FederatedModule` calls these hooks on callbacks of this class only.

    The order in a round: ``on_round_start``; for every client ``on_client_update`` (on the client's side of the wire) and
    ``on_client_message`` (on the server's); ``on_cohort_end`` after each pass, once the sums of all processes have been added and decoded;
    ``on_round_end``. Clients that live in other processes, as over a network, call no ``on_client_update``.
    """

    def on_round_start(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Called before the first client of an attempt (and before each further pass of a codec with several)."""

    def on_client_update(self, trainer: Trainer, pl_module: LightningModule, context: Context, update: ClientUpdate) -> None:
        """Called with a client's update before it is encoded, on the client's side: may read and change it."""

    def on_client_message(self, trainer: Trainer, pl_module: LightningModule, round: Call, reply: Reply) -> None:
        """Called when a client's code has arrived, on the server's side, before it is added: a ``MessageError`` drops the client."""

    def on_cohort_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Called with the cohort's sum in ``round.codes`` and what it was decoded to in ``round.aggregate``, which may be changed."""

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Called when the server has taken its step."""


def section(trainer: Trainer, step: str) -> AbstractContextManager[object]:
    """Return what to run a ``step`` of a round in, so that the Trainer's profiler lists it as ``[Round]<step>``.

    Entered once a client or less often, never for a local step: without a profiler it costs a look at the Trainer.
    """
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    found: AbstractContextManager[object] = _UNTIMED if type(profiler) is PassThroughProfiler else profiler.profile(f"[Round]{step}")
    return found


def tell(sentence: str) -> None:
    """Warn of this on the first process: a ``UserWarning`` that is shown without the file and the line that it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        rank_zero_warn(sentence, stacklevel=5)
    finally:
        warnings.formatwarning = before
