"""Trains several clients at once on the cores of one process, in threads: for CPUs and steps that take milliseconds."""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from fedlight.clients.algorithms import Algorithm, LocalResult, Memory
from fedlight.clients.engine import Batch, ClientTask, Engine, Trained, precision_on, require_plain, train_client
from fedlight.clients.layers import own_dropout, quicken_pooling
from fedlight.clients.local_model import LocalModel, ends_after
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.process import cores_of_a_process


class Threaded(Engine):
    """Clients in threads, each with one torch thread: a thread that finishes takes the next client, so that cores seldom wait.

    A client's update equals that of `Sequential` on one torch thread, bit for bit, whichever clients train at the same time: threads
    have their own models and generators, and results are returned in the clients' order. Threads cannot share a step's time in Python:
    if steps take less than a millisecond, processes (`--trainer.devices`) or `Vectorized` are faster. All threads use the same
    algorithm, loss and augmentations, which must not change themselves; fedlight's do not.

    Args:
        workers: Number of training threads (the usable cores divided by the processes if not given). There are up to two models per
            thread, reused from round to round.

    Raises:
        ConfigurationError: if ``workers`` is less than 1, or (before training) if it cannot train: a device other than the CPU,
            a LightningModule, data that is not in memory, code that draws from the process's generators (except ``nn.Dropout``).
    """

    def __init__(self, workers: int | None = None) -> None:
        require(workers is None or workers >= 1, f"Expected `workers` >= 1 but got {workers}")
        self.workers = workers
        self._pattern: LocalModel | None = None
        self._models: list[LocalModel] = []

    def train(self, model: LocalModel, algorithm: Algorithm, tasks: Iterable[ClientTask], round: int) -> Trained:
        """Yield every task with its result; at most as many clients as models are in training, or trained and not yet requested."""
        workers = self.workers or cores_of_a_process()
        precision, waiting = precision_on(model.weights.device), iter(tasks)
        running: deque[tuple[ClientTask, LocalModel, Future[LocalResult]]] = deque()
        if self._pattern is not model:
            self._pattern, self._models = model, []
        free = deque(self._models)  # from earlier rounds
        with _one_torch_thread(), ThreadPoolExecutor(workers, "fedlight-train", torch.set_num_threads, (1,)) as threads:
            try:
                while True:
                    # Two models per thread, so that no thread waits until its last result is taken.
                    while len(running) < 2 * workers and (task := next(waiting, None)) is not None:
                        if not free:
                            self._models.append(twin(model))
                            free.append(self._models[-1])
                        own = free.popleft()
                        running.append((task, own, threads.submit(train_client, own, algorithm, task, round, precision)))
                    if not running:
                        return
                    task, own, result = running.popleft()
                    yield task, result.result(), own
                    free.append(own)
            finally:
                threads.shutdown(cancel_futures=True)

    def check(self, make_model: Callable[[], LocalModel], algorithm: Algorithm, data: Batch, personal: bool, device: torch.device) -> None:
        """Refuse training that uses state shared by threads, by testing a local step on two copies of a client's first sample."""
        model, (x, y) = make_model(), data
        require_plain(model, x, "Threaded", "steps of a LightningModule and items of a data module may touch what threads share")
        if device.type != "cpu":
            raise ConfigurationError(
                f"Expected the CPU under `engine` Threaded but got {device}: use the engine Vectorized or Sequential, or "
                "`--trainer.accelerator cpu`"
            )
        before, sample = _generators(), torch.zeros(2, dtype=torch.int64)  # BatchNorm cannot train on a batch of one
        task = ClientTask(0, x[sample], y[sample], model.weights.clone(), model.buffers.clone(), torch.Generator())
        task.memory = Memory(server=algorithm.broadcast({}))
        with torch.random.fork_rng(devices=[]):
            train_client(twin(model, ends_after(1)), algorithm, task, 0, precision_on(model.weights.device))
            untouched = _generators() == before
        if not untouched:
            raise ConfigurationError(
                "Expected local training that draws from its own generators under `engine` Threaded but that of "
                f"{type(model.module).__name__} by {type(algorithm).__name__} draws from the process's (torch's, NumPy's or Python's), "
                "which threads share: replace nn.functional.dropout by nn.Dropout, have augmentations draw from the generator that they "
                "are given, or use the engine Sequential"
            )


def _generators() -> bytes:
    """Return the states of the generators that all threads share: torch's, NumPy's and Python's."""
    states = torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()  # noqa: NPY002 (the legacy one is looked at)
    return pickle.dumps(states)


def twin(model: LocalModel, kind: type[LocalModel] | None = None) -> LocalModel:
    """Return a copy of the model, of its own kind if none is given, that shares nothing with it and has its own generator."""
    made = (kind or type(model))(model.network, model.objective, augment=model.augment)
    quicken_pooling(made.module)
    made.noise = own_dropout(made.module)
    return made


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Make this thread compute on one core, like training threads, until the end of the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
