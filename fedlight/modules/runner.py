"""Running a cohort: each client from the global model to its upload, one after another on this process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedlight.clients.algorithms import Algorithm, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.clients.personal import PersonalNorm
from fedlight.clients.store import ClientStore
from fedlight.core.random import derive_seed, torch_generator
from fedlight.core.rounds import Round, Upload
from fedlight.data import FederatedDataModule


class CohortRunner:
    """Trains the clients of a cohort from one global state; nothing of one client reaches the next.

    Args:
        model: the local model that every client of this process uses in turn.
        algorithm: the local training.
        data: clients' data.
        store: clients' own state.
        by_samples: whether an upload's weight is the client's number of samples (else 1).
        personal: the normalisation layers that stay with the clients, if any do.
        silent: whether a client whose training failed still answers, with nothing (else it is left out, which tells that it failed).
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
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.data = data
        self.store = store
        self.by_samples = by_samples
        self.personal = personal
        self.silent = silent

    def run(self, round: Round, weights: Tensor, buffers: Tensor) -> Iterator[Upload]:
        """Yield the upload of every client of this process whose training stayed finite; name the others in ``round.dropped``."""
        public = round.public
        devices = [weights.device] if weights.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            for client in map(int, round.mine):
                # Dropout draws from the global generator, which is seeded for the client here and put back after the cohort.
                self.model.seed_noise(derive_seed(public.seed, public.round, public.attempt, client, "dropout"))
                upload = self._train(client, round, weights, buffers)
                reason = unusable(upload)
                if reason is None:
                    yield upload
                else:
                    self.store.drop(client)
                    round.dropped.append((client, reason))
                    if self.silent:
                        upload.usable = False
                        yield upload

    def _train(self, client: int, round: Round, weights: Tensor, buffers: Tensor) -> Upload:
        x, y = self.data.client_data(client)
        state = self.store.draft(client).setdefault("norm", {}) if self.personal else {}
        if self.personal:
            weights, buffers = self.personal.restore(state, weights, buffers)
        self.model.load(weights, buffers)
        public = round.public
        generator = torch_generator(public.seed, public.round, public.attempt, client, "batches")
        own = self.store.draft(client).setdefault("algorithm", {}) if self.algorithm.client_state else {}
        result = self.algorithm.run(self.model, x, y, public.round, generator, Memory(own, round.server))
        sent = self.model.buffers.clone()
        if self.personal:
            self.personal.keep(state, self.model.weights, self.model.buffers, result.update)
            sent = sent[:0]
        return Upload(client, result.upload(), sent, len(y) if self.by_samples else 1, float(result.loss), self.by_samples)


def unusable(upload: Upload) -> str | None:
    """Return why an upload must not enter a sum, or None: one pass over the update, for NaN, Inf and what would overflow."""
    if not math.isfinite(upload.loss):
        return f"its loss is {upload.loss}"
    if not math.isfinite(upload.update.sum()) or (len(upload.buffers) and not math.isfinite(upload.buffers.sum())):
        return "its update is not finite"
    return None
