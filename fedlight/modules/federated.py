"""The LightningModule that orchestrates rounds: one `training_step` is one round is one step of the server optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from fedlight.aggregation import Aggregator, PlainAggregator
from fedlight.callbacks.base import tell
from fedlight.callbacks.codec import CodecPretraining, GradientDecoder, GradientEncoder, codec_callbacks
from fedlight.clients.algorithms import Algorithm
from fedlight.clients.auto import Auto
from fedlight.clients.engine import Engine
from fedlight.clients.local_model import Augment, LocalModel
from fedlight.clients.own_optimizer import default_algorithm
from fedlight.clients.store import ClientStore
from fedlight.core.bank import UpdateBank
from fedlight.core.checkpoint import RUN
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError, require, require_counts
from fedlight.core.export import codec_state, restore_codec
from fedlight.core.kinds import kinds_of, require_kinds
from fedlight.core.layout import trainable
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.core.process import keep_freed_memory
from fedlight.modules import checks
from fedlight.modules.checkpoints import CLIENTS, keep_clients_apart
from fedlight.modules.engines import check_engine, choose_engine
from fedlight.modules.evaluation import StageMetrics, log_comparison, log_round, named_metrics, round_metrics, warn_of_unseen_models
from fedlight.modules.forwarding import Forwarding
from fedlight.modules.notices import check_callbacks, check_network, silent_flags, suit_rounds
from fedlight.modules.own_steps import task_of
from fedlight.modules.pretraining import fit_codec, reconstruction_error, record_for
from fedlight.modules.sides import Sides
from fedlight.modules.state import check_trainer, clients_state, restore_run, run_state
from fedlight.modules.stopping import await_first, signals_of, watch_signals
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds import Availability, Clients, Downlink, Full, FullModel, Server, ServerState, run_round
from fedlight.rounds.held import HeldModels
from fedlight.rounds.stop import Stop


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return SGD with learning rate 1: the global model moves by exactly the aggregated update."""
    return torch.optim.SGD(params, lr=1.0)


class FederatedModule(Forwarding):
    """Federated training of a network: clients train locally, send codes of their updates, the server decodes the sum.

    Args:
        network: The global model: maps inputs to logits (or to what `loss` takes), or a LightningModule, whose own steps are run.
        codec: How updates are encoded (sent in full, as float32, if not given).
        codec_path: Folder of a trained codec (`encoder.safetensors`, `decoder.safetensors`) to use instead of pretraining one.
        algorithm: Local training of the clients; 10 steps of 32 samples if not given: of a LightningModule's own optimizer, or of SGD at
            learning rate 0.05.
        engine: How a process trains its clients: one after another (Sequential), each in a thread (Threaded; for a CPU) or many as one
            computation (Vectorized; for a GPU). The fastest of them in a short trial before the first round (Auto), if not given.
        loss: Loss of outputs and targets (cross entropy if not given; a LightningModule has its own).
        server_optimizer: Optimizer that takes the aggregated update for a gradient (SGD with learning rate 1 if not given).
        server_scheduler: Learning-rate schedule of the server optimizer, stepped once a round (constant if not given).
        privacy: Differential privacy of users: CentralDP, DistributedDP or LocalDP (none if not given).
        downlink: What clients download before a round (the whole model, FullModel, if not given; CatchUp or CodedModel for sums).
        aggregator: How codes are summed (in the clear, PlainAggregator, if not given; SecureAggregator hides single clients).
        clients: What carries requests to clients and replies back (clients simulated in this process if not given; ThroughBytes for the
            same by way of the bytes that a network would carry).
        weighting: Whether clients count equally, or by their number of samples.
        availability: Which of the invited simulated clients answer (all of them, Full, if not given).
        batch_norm: Whether BatchNorm layers are averaged like everything else (their statistics plainly), or stay local to each client.
        metrics: Further TorchMetrics of logits and targets by name, logged as `val/<name>` and `test/<name>` (none if not given); those of
            a MetricCollection as `val/<name>_<its name>`, or by their own names if it is all that is given.
        min_clients: Least number of clients whose updates must arrive; below it the round is repeated with another cohort.
        max_attempts: Attempts at a round before the run is stopped.
        client_memory_mb: MiB of what clients keep between rounds beyond which it lies in temporary files (checkpoints hold all of it).
        sim_every: Rounds between comparisons with the true aggregate and code histograms, which a real server could not make; 0 for never.
        seed: Seed of everything that clients draw.

    Raises:
        ConfigurationError: if an argument is of another kind or out of range, or (before training) does not go with the data, the codec
            or the Trainer.
        RoundFailedError: if no attempt at a round had enough usable clients.
    """

    stage_metrics: StageMetrics
    server: Server  # made when a fit starts, as is what carries its requests
    _connection: Clients

    def __init__(
        self,
        network: nn.Module,
        codec: Codec | None = None,
        codec_path: str | None = None,
        algorithm: Algorithm | None = None,
        engine: Engine | None = None,
        loss: nn.Module | None = None,
        server_optimizer: OptimizerCallable = sgd,
        server_scheduler: LRSchedulerCallable | None = None,
        privacy: PrivacyMechanism | None = None,
        downlink: Downlink | None = None,
        aggregator: Aggregator | None = None,
        clients: Clients | None = None,
        weighting: Literal["equal", "samples"] = "equal",
        availability: Availability | None = None,
        batch_norm: Literal["mean", "local"] = "mean",
        metrics: dict[str, Metric | MetricCollection] | MetricCollection | None = None,
        min_clients: int = 1,
        max_attempts: int = 3,
        client_memory_mb: float = 1024.0,
        sim_every: int = 10,
        seed: int = 0,
    ) -> None:
        kinds = kinds_of(FederatedModule.__init__) | {"codec_path": str | Path | None}
        require_kinds(locals(), kinds, {"clients": "num_clients"})
        super().__init__()
        require_counts(min_clients=min_clients, max_attempts=max_attempts)
        require(sim_every >= 0, f"Expected `sim_every` >= 0 but got {sim_every}")
        checks.check_parts(network, loss, server_scheduler)
        self.automatic_optimization = False
        self.network = network
        self.loss = loss or nn.CrossEntropyLoss()
        self.privacy = privacy
        self.codec_path = codec_path
        self.algorithm = algorithm or default_algorithm(isinstance(network, LightningModule))
        self.engine = engine or Auto()
        checks.check_algorithm(self.algorithm, batch_norm, privacy)
        self.codec = checks.upload_codec(checks.chosen_codec(codec, codec_path, privacy), self.algorithm)
        self.server_optimizer = server_optimizer
        self.server_scheduler = server_scheduler
        self.weighting = weighting
        self.availability = availability or Full()
        self.own_metrics = named_metrics(metrics or {})
        self.batch_norm = batch_norm
        self.min_clients = min_clients
        self.max_attempts = max_attempts
        self.client_memory_mb = client_memory_mb
        self.sim_every = sim_every
        self.seed = seed
        self.store = ClientStore(client_memory_mb)
        self.held = HeldModels(self.codec)
        self.server_state = ServerState()
        self.downlink = downlink or FullModel()
        self.aggregator = aggregator or PlainAggregator()
        self.clients = clients
        self.pretrain_metrics: dict[str, float] = {}
        self._built = False
        self.stop = Stop()

    def configure_callbacks(self) -> list[Callback]:
        """Return the encoder and decoder of the module's codec, a pretraining phase unless the Trainer has one, and the user's own."""
        check_trainer(self.trainer)
        if self._compiler_ctx is not None:
            raise ConfigurationError(
                "Expected a federated module that is not compiled, because a round is no graph, but got torch.compile of one: compile the "
                "networks within yours, such as self.net = torch.compile(self.net)"
            )
        self._built = False
        self.attach_own()
        suit_rounds(self.trainer)
        self.stop = Stop()
        watch_signals(self.trainer, self.stop)
        keep_clients_apart(self.trainer)
        given: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        added = self.own_callbacks()
        check_callbacks([*given, *added])
        if not any(isinstance(callback, CodecPretraining) for callback in given):
            added.append(CodecPretraining())
        # Lightning would quietly replace a half that was given by one returned here, so a lone or foreign half is left to be refused.
        if not any(isinstance(callback, (GradientEncoder, GradientDecoder)) for callback in given):
            added += codec_callbacks(self.codec)
        return added

    def configure_optimizers(self) -> Any:
        """Return the server optimizer, the only one that Lightning sees."""
        optimizer = self.server_optimizer(trainable(self.network))
        return optimizer if self.server_scheduler is None else [[optimizer], [self.server_scheduler(optimizer)]]

    def build(self, stage: str) -> None:
        """Set up the data that no Trainer was given, and let the network make its parts: once, before anything is told its weights."""
        if self._built:
            return
        if self.own_data is not None:
            self.own_data.setup(stage)
        self.task = task_of(self)
        self.task.build(stage)
        check_network(self.network)
        self._built = True

    def setup(self, stage: str) -> None:
        """Set up the data that no Trainer was given, check that the parts go together, and begin a run with nothing remembered."""
        self.build(stage)
        self.settings = None
        if stage == "fit":
            checks.start_privacy(self)
        if not isinstance(self.network, LightningModule) and not self.network.training:
            self.network.train()  # a network that was evaluated before; a LightningModule keeps its modes, as in Lightning
        self.task.setup(stage)
        if stage != "fit":
            return
        if self.clients is None or self.clients.simulates:
            check_engine(self)
        if self.clients is not None and self.trainer.world_size > 1:
            raise ConfigurationError(
                f"Expected one process with `clients` {type(self.clients).__name__} but got {self.trainer.world_size}: set "
                "`trainer.devices` to 1, or leave `clients` out, whose simulated clients processes share"
            )
        self.aggregator.check(checks.aggregation_setting(self, self.trainer.world_size))
        checks.check_cohorts(self)
        self.downlink.check(self.codec, self.algorithm, self.server_optimizer(trainable(self.network)))
        warn_of_unseen_models(self)
        if self.trainer.limit_train_batches != 0:
            for sentence in silent_flags(self.trainer, self.task.validates, isinstance(self.network, LightningModule)):
                tell(sentence)
        # A second fit goes on from weights that nobody can draw, and over a network nobody draws them.
        self.downlink.reset(drawn=not self.server_state.rounds and (self.clients is None or self.clients.simulates))
        self.server_state.reset()
        self.store = ClientStore(self.client_memory_mb)
        self.held = HeldModels(self.codec)
        self.train_seconds = 0.0

    def local_model(self, augment: Augment | None) -> LocalModel:
        """Return what clients train, on the device that rounds run on."""
        return self.task.local_model(augment)

    def on_fit_start(self) -> None:
        """Check what was restored, and make both sides of the rounds on the device that they run on."""
        self.task.start()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.data.to(self.device)
        self.codec.to(self.device)
        if any(parameter.dtype == torch.float64 for parameter in trainable(self.network)):
            tell("Weights are float64 but updates travel as codes of float32 at most: they are rounded to 1e-7 of their size")
        checks.begin_ledger(self)
        self._connect()

    def _connect(self) -> None:
        """Make both sides of the rounds of the network as it is now."""
        checks.check_trained(self.network, self.trainer.optimizers)
        sides = Sides(self)
        self.server, self._connection = sides.server, sides.clients

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the global model's logits ``[n, classes]``, or what the network makes of its inputs."""
        return self.network(*args, **kwargs)

    def pretrain(
        self,
        proxy: ProxyFederation,
        training: CodecTraining,
        progress: bool | None = None,
        first_round: int = 0,
        growth: float | None = None,
        history: Tensor | None = None,
    ) -> dict[str, float]:
        """Record updates on proxy data and fit the codec to them, on rank 0; every process ends with the same codec.

        ``first_round`` numbers the recorded rounds (it seeds them and places them in learning-rate schedules). With ``growth`` the
        codec is fitted only if its error on what was recorded has grown by this factor since the last fit. ``history`` ``[k, dim]`` are
        past aggregates, the last first, to fit to as well.

        Returns the metrics of the fit, such as the error on held-out updates beside PCA's (empty on other ranks and without a fit).
        """
        start = time.monotonic()
        metrics: dict[str, float] = {}
        state: dict[str, Any] | None = None
        log_dir = self.trainer.log_dir  # asked of all processes together
        if self.trainer.is_global_zero:
            show = self.trainer.progress_bar_callback is not None if progress is None else progress
            bank = record_for(self, proxy, show, first_round=first_round, history=history)
            if growth is None or self._has_grown(bank, growth):
                folder = Path(log_dir) if log_dir and self.loggers else None
                metrics = fit_codec(self.codec, bank, training, self.device, folder, show, self.seed)
                state = codec_state(self.codec)
            for logger in self.loggers if metrics else ():
                logger.log_metrics({f"pretrain/{name}": value for name, value in metrics.items()}, step=first_round)
        if self.trainer.world_size > 1:
            await_first(self.trainer)
            state, error = self.trainer.strategy.broadcast((state, metrics.get("held_out_error", self.codec_error)))
            if state is not None:
                restore_codec(self.codec, state)
            self.codec_error = error
        self.codec_error = metrics.get("held_out_error", self.codec_error)
        self.codec.to(self.device)
        self.pretrain_seconds += time.monotonic() - start
        if self._started is not None:  # a refresh is no part of the rounds' time
            self._started += time.monotonic() - start
        self.pretrain_metrics = metrics
        return metrics

    def _has_grown(self, bank: UpdateBank, growth: float) -> bool:
        """Whether the codec's error has; of a codec that was fitted elsewhere the first error seen is the one to compare with."""
        # With the server's own gain: that of round 0 would say that updates are small by now, not that their directions changed.
        error = reconstruction_error(self.codec.to("cpu"), bank, None, self.server_state.decoder)
        if self.codec_error is None:
            self.codec_error = error
        return error > growth * self.codec_error

    def on_train_start(self) -> None:
        """Start the clock, unless a process was told to stop before, and choose an engine."""
        self._stop_together()
        if self.task.begin():  # the user's hook may have made what clients need
            self._connect()
        self._started = time.monotonic()
        choose_engine(self)

    def on_train_end(self) -> None:
        """Stop the clock; a signal since the last round leaves the finished run untested."""
        self.task.call("on_train_end")
        self.train_seconds, self._started = self.seconds_trained(), None
        self._stop_together()

    def _stop_together(self) -> None:
        self.stop.agree(self.device)
        self._note_stop()
        if self.stop.agreed is not None:
            raise SIGTERMException

    def _note_stop(self) -> None:
        if self.stop.agreed is not None and (signals := signals_of(self.trainer)):
            signals.release_workers()  # from now on processes may end in any order

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Run the round whose number is the Trainer's global step; the run ends where the privacy budget allows no more."""
        call = run_round(self.server, self._connection, self.trainer.global_step)
        self._note_stop()
        if not self.server.affordable:
            self.trainer.should_stop = True
        if call is None:
            return
        with self.server.watch.section("log"):
            dim = self.layout.dim
            carried = {f"bytes/{name}": value for name, value in self._connection.figures().items()}
            log_round(self, round_metrics(self.server, call, dim) | carried, call.context.round)
            log_comparison(self, call, self.algorithm.vectors * dim)  # numbers beside the vectors would drown them

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add everything a round needs beyond weights and optimizer, and what goes into the checkpoint's file of clients."""
        checkpoint[RUN], checkpoint[CLIENTS] = run_state(self), clients_state(self)
        self.save_own(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration, and take over its state."""
        self.load_own(checkpoint)
        restore_run(self, checkpoint)
