"""Running a cohort: each client of this process from the global model to its upload."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from fedlight.clients.algorithms import Algorithm, LocalResult, Memory
from fedlight.clients.engine import ClientTask, Engine, Sequential
from fedlight.clients.local_model import LocalModel
from fedlight.clients.personal import PersonalNorm
from fedlight.clients.store import ClientStore
from fedlight.core.random import derive_seed, torch_generator
from fedlight.core.rounds import Round, Upload
from fedlight.data import FederatedDataModule


class CohortRunner:
    """Trains the clients of a cohort from one global state; nothing of one client reaches the next.

    Args:
        model: the local model of this process, which the engine trains clients with, or makes others like it.
        algorithm: the local training.
        data: clients' data.
        store: clients' own state.
        by_samples: whether an upload's weight is the client's number of samples (else 1).
        personal: the normalisation layers that stay with the clients, if any do.
        silent: whether a client whose training failed still answers, with nothing (else it is left out, which tells that it failed).
        engine: how clients are trained, one after another if not given.
    """

    def __init__(
        self,
        model: LocalModel,
        algorithm: Algorithm,
        data: FederatedDataModule,
        store: ClientStore,
        by_samples: bool,
        personal: PersonalNorm | None,
        silent: bool = False,
        engine: Engine | None = None,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.data = data
        self.store = store
        self.by_samples = by_samples
        self.personal = personal
        self.silent = silent
        self.engine = engine or Sequential()

    def run(self, round: Round, weights: Tensor, buffers: Tensor) -> Generator[Upload]:
        """Yield the upload of every client of this process whose training stayed finite; name the others in ``round.dropped``."""
        context = round.context
        devices = [weights.device] if weights.is_cuda else []
        tasks = (self._turn(client, round, weights, buffers) for client in map(int, round.mine))
        # Dropout may draw from the global generator, which is seeded for every client and put back after the cohort.
        with (
            torch.random.fork_rng(devices=devices),
            closing(self.engine.train(self.model, self.algorithm, tasks, context.round)) as trained,
        ):
            for task, result, model in trained:
                upload = self._upload(task, result, model)
                reason = unusable(upload)
                if reason is None:
                    yield upload
                else:
                    self.store.drop(task.client)
                    round.dropped.append((task.client, reason))
                    if self.silent:
                        upload.usable = False
                        yield upload

    def _turn(self, client: int, round: Round, weights: Tensor, buffers: Tensor) -> ClientTask:
        context = round.context
        norm = self.store.draft(client).setdefault("norm", {}) if self.personal else {}
        if self.personal:
            weights, buffers = self.personal.restore(norm, weights, buffers)
        own = self.store.draft(client).setdefault("algorithm", {}) if self.algorithm.client_state else {}
        x, y = self.data.client_data(client)
        generator = torch_generator(context.seed, context.round, context.attempt, client, "batches")
        noise = derive_seed(context.seed, context.round, context.attempt, client, "dropout")
        return ClientTask(client, x, y, weights, buffers, generator, noise, Memory(own, round.server), norm)

    def _upload(self, task: ClientTask, result: LocalResult, model: LocalModel) -> Upload:
        sent = model.buffers.clone()
        if self.personal:
            self.personal.keep(task.norm, model.weights, model.buffers, result.update)
            sent = sent[:0]
        weight = len(task.y) if self.by_samples else 1
        return Upload(task.client, result.upload(), sent, weight, float(result.loss), self.by_samples)


def unusable(upload: Upload) -> str | None:
    """Return why an upload must not enter a sum, or None: one pass over the update, for NaN, Inf and what would overflow."""
    if not math.isfinite(upload.loss):
        return f"its loss is {upload.loss}"
    if not math.isfinite(upload.update.sum()) or (len(upload.buffers) and not math.isfinite(upload.buffers.sum())):
        return "its update is not finite"
    return None
