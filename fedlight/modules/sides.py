"""Both sides of the rounds of a Lightning run, and what is between them."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from lightning.pytorch import Callback

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.codec import GradientDecoder, GradientEncoder
from fedlight.clients.personal import PersonalNorm
from fedlight.core.buffers import constants
from fedlight.core.orders import epoch_lengths
from fedlight.modules.checks import check_batches
from fedlight.modules.global_model import LightningModel
from fedlight.modules.watch import CallbackWatch
from fedlight.rounds import ClientHost, Clients, Connection, ReplyFormat, Server, Simulated

C = TypeVar("C", bound=Callback)


class Sides:
    """The server of a run's rounds and its clients, made of the network as it is now.

    Args:
        run: the module that runs the rounds.

    Attributes:
        server: the server's side.
        clients: what carries requests to clients: those that are simulated here, or `model.clients`.
    """

    def __init__(self, run: FederatedRun) -> None:
        self.run = run
        self.watch = CallbackWatch(run)
        format = ReplyFormat.of(run.network, run.batch_norm == "mean", run.weighting == "samples", run.aggregator, run.privacy)
        elsewhere = run.clients is not None and not run.clients.simulates
        known = constants(run.network, run.server_state.extras) if elsewhere else {}
        population, rounds = run.data.num_population, run.trainer.max_steps
        between = Connection(format, self._simulated, run.codec, run.aggregator, run.privacy, population, known, rounds)
        self.clients = self._simulated() if run.clients is None else run.clients.attach(between)
        self.server = Server(
            LightningModel(run, run.network, local_steps(run)),
            run.codec,
            run.algorithm,
            run.aggregator,
            run.downlink,
            cohort=self._cohort,
            population=population,
            privacy=run.privacy,
            state=run.server_state,
            min_clients=run.min_clients,
            max_attempts=run.max_attempts,
            seed=run.seed,
            decode=self._callback(GradientDecoder).decode,
            watch=self.watch,
            compares=self._compares,
            stop=run.stop,
            takes_extras=bool(format.extras),
        )

    def _simulated(self) -> Clients:
        """Return the clients that this process simulates."""
        run, host = self.run, self._host()
        check_batches(run, host.model)
        return Simulated(
            host,
            run.availability,
            lambda client: run.algorithm.work(run.data.client_size(client)),
            run.aggregator.stages,
            run.trainer.global_rank,
            run.trainer.world_size,
        )

    def _host(self) -> ClientHost:
        """Return the clients' side, for all clients that this process simulates."""
        run = self.run
        model = run.local_model(run.data.augmentation)
        run.algorithm.check(model)
        if run.held.initial is None and run.clients is not None:
            run.held.initial = LightningModel(run, run.network).read()
        return ClientHost(
            model,
            run.algorithm,
            run.data.client_data,
            run.held,
            sealer=run.aggregator.sealer(),
            hides_messages=run.aggregator.hides_messages,
            store=run.store,
            by_samples=run.weighting == "samples",
            personal=PersonalNorm(run.network) if run.batch_norm == "local" else None,
            privacy=run.privacy,
            engine=run.engine,
            encode=self._callback(GradientEncoder).encode,
            watch=self.watch,
            compares=self._compares,
        )

    def _cohort(self, number: int, attempt: int) -> np.ndarray:
        """Return who is invited: the sampler's cohort, among those who are there; from privacy's secret if it has one."""
        run, sampler = self.run, self.run.data.sampler
        secret = run.privacy.cohort_seed if run.privacy is not None else None
        seed = run.data.seed if secret is None else secret
        drawn = sampler.sample(run.data.num_population, seed, number, attempt)
        present = self.clients.present(min(self.server.least_clients, len(drawn)))
        if present is None or set(drawn.tolist()) <= set(present):
            return drawn
        there = np.array(sorted(present), dtype=np.int64)
        return there[sampler.sample(len(there), seed, number, attempt)] if len(there) > len(drawn) else there

    def _callback(self, kind: type[C]) -> C:
        callbacks: list[Any] = self.run.trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, kind))

    def _compares(self, number: int) -> bool:
        """Whether the simulation compares with the true aggregate in a round."""
        run = self.run
        return run.aggregator.sim_logs and bool(run.sim_every) and number % run.sim_every == 0


def local_steps(run: FederatedRun) -> int:
    """Return the local steps of a round, of a client of mean size if `algorithm` has `epochs`."""
    epochs = getattr(run.algorithm, "epochs", None)
    if epochs is None:
        return getattr(run.algorithm, "steps", None) or 1
    order = getattr(run.data.x, "order", None)
    lengths = epoch_lengths if order is None else order.lengths
    return sum(lengths(round(float(run.data.client_sizes.mean())), run.algorithm.batch_size, epochs, None))  # type: ignore[attr-defined]
