"""Both sides of the rounds of a Lightning run, what is between them, and the global model as the server sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn

from fedlight.callbacks.base import FederatedCallback, FederatedRun, section
from fedlight.callbacks.codec import GradientDecoder, GradientEncoder
from fedlight.clients.personal import PersonalNorm
from fedlight.core.buffers import constants, counters, extras, statistics
from fedlight.core.layout import Layout, as_is, flatten, trainable
from fedlight.core.model import Model
from fedlight.core.orders import epoch_lengths
from fedlight.modules.checks import check_batches
from fedlight.rounds import ClientHost, Clients, Connection, ReplyFormat, Server, Simulated
from fedlight.rounds.call import Watch


class LightningModel:
    """Weights of a ``network``, in the modes that clients train it in, moved by the one optimizer of ``module`` (a `GlobalModel`).

    BatchNorm's own counters count ``steps``, the local steps of a client in a round; nothing else reads these.
    """

    def __init__(self, module: LightningModule, network: nn.Module, steps: int = 1) -> None:
        self.module = module
        self.network = network
        self.steps = steps
        self.layout = Layout.of(network)
        self._statistics = statistics(network)
        self._counters = counters(network, counting=True)
        self._extras = extras(network)

    @property
    def device(self) -> torch.device:
        """Where sums are decoded."""
        return self.module.device

    def read(self) -> Model:
        """Return a copy of weights and buffers."""
        weights = flatten(trainable(self.network))
        return Model(weights, flatten(place.table[place.key] for place in self._statistics).to(weights.device))

    def extras(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of these extras."""
        found = {name: self._extras[name].get() for name in names}
        return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}

    def step(self, update: Tensor, buffers: Tensor | None, extras: Mapping[str, Tensor] | None = None) -> float:
        """Take one optimizer step, which is one `global_step`, then one of the schedule; return the step's learning rate."""
        optimizer, scheduler = self.module.optimizers(), self.module.lr_schedulers()
        for parameter, piece in zip(trainable(self.network), self.layout.split(update), strict=True):
            parameter.grad = as_is(piece, parameter)
        optimizer.step()  # type: ignore[union-attr]
        lr = float(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        own = [place.table[place.key] for place in self._statistics]
        if buffers is not None:
            for buffer, piece in zip(own, torch.split(buffers, [b.numel() for b in own]), strict=True):
                buffer.copy_(piece.view(buffer.shape))
        for place in self._counters:
            place.table[place.key].add_(self.steps if buffers is not None else 0)
        for name, value in (extras or {}).items():  # new tensors: what was there is what clients put back, and stays as it is
            place = self._extras[name]
            if isinstance(held := place.get(), nn.Parameter):
                held.data = value.to(self.device)
            else:
                place.table[place.key] = value.to(self.device)
        return lr

    def write(self, weights: Tensor) -> None:
        """Replace the weights ``[dim]``."""
        with torch.no_grad():
            for parameter, piece in zip(trainable(self.network), self.layout.split(weights), strict=True):
                parameter.copy_(piece)


HOOKS = ("on_round_start", "on_client_update", "on_client_message", "on_cohort_end", "on_round_end")


class CallbackWatch(Watch):
    """Calls the hooks of `FederatedCallback` on every callback of that class, and times steps with the Trainer's profiler.

    Hooks that no callback has, and sections without a profiler, stay those that do nothing.
    """

    def __init__(self, module: LightningModule) -> None:
        trainer: Any = module.trainer
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, FederatedCallback)]
        for hook in HOOKS:
            own = [getattr(one, hook) for one in callbacks if getattr(type(one), hook) is not getattr(FederatedCallback, hook)]
            if own:
                setattr(self, hook, partial(_call_each, [partial(method, trainer, module) for method in own]))
        if type(trainer.profiler) is not PassThroughProfiler:
            vars(self)["section"] = partial(section, trainer)


def _call_each(methods: list[partial[None]], *given: Any) -> None:
    for method in methods:
        method(*given)


C = TypeVar("C", bound=Callback)


class Sides:
    """The server of a run's rounds and what carries its requests to clients, made of the network as it is now."""

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
        run = self.run
        model = run.local_model(run.data.augmentation)
        run.algorithm.check(model)
        if run.held.initial is None and run.clients is not None:
            run.held.initial = LightningModel(run, run.network).read()
        host = ClientHost(
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
        check_batches(run, model)
        return Simulated(
            host,
            run.availability,
            lambda client: run.algorithm.work(run.data.client_size(client)),
            run.aggregator.stages,
            run.trainer.global_rank,
            run.trainer.world_size,
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
