"""Which engine and how many threads a run uses: those that are named, or else those that a trial finds to be fastest."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from fedlight.callbacks.base import FederatedRun
from fedlight.clients.algorithms import Memory
from fedlight.clients.auto import CROWD, NAMES, THREADS_MARGIN, Auto, choose, time_threads
from fedlight.clients.engine import ClientTask
from fedlight.clients.local_model import LocalModel
from fedlight.core.process import cores_of_a_process
from fedlight.core.random import torch_generator
from fedlight.rounds.reduce import from_first, reduce_sum


def check_engine(run: FederatedRun) -> None:
    """Refuse an engine that is named and cannot train the run; find those that can, if none is."""
    if isinstance(run.engine, Auto) and not _known(run):
        return
    with run.trainer.precision_plugin.forward_context():
        model, device = partial(run.local_model, run.data.augmentation), run.trainer.strategy.root_device
        run.engine.check(model, run.algorithm, run.data.client_data(0), run.batch_norm == "local", device)


def _known(run: FederatedRun) -> bool:
    """Whether all that clients share is fedlight's or torch's: of a user's own loss nobody knows that it does not change itself."""
    if isinstance(run.network, LightningModule):
        return False
    shared = (run.algorithm, run.loss, run.data.augmentation)
    return all(type(part).__module__.partition(".")[0] in ("fedlight", "torch", "builtins") for part in shared)


def choose_engine(run: FederatedRun) -> None:
    """Let an `Auto` choose before the first round, alike in all processes, and say what it chose."""
    auto = run.engine
    simulated = run.clients is None or run.clients.simulates
    if not isinstance(auto, Auto) or auto.chosen or not simulated:
        return
    if len(auto.candidates) == 1:
        auto.take("Sequential")
        return
    cohort = max(1, len(run.data.cohort(0, 0)) // run.trainer.world_size)
    with run.trainer.precision_plugin.forward_context():
        model = run.local_model(run.data.augmentation)
        seconds = auto.time(model, run.algorithm, partial(trial_tasks, run, model), cohort)
    total = reduce_sum(torch.tensor([seconds[name] for name in NAMES], dtype=torch.float64, device=run.device)).tolist()
    shares = {name: one / run.trainer.world_size for name, one in zip(NAMES, total, strict=True)}
    auto.take(choose(shares))
    told = ", ".join(f"{name} {1000 * one:.3g} ms" for name, one in shares.items() if math.isfinite(one))
    rank_zero_info(f"Engine {auto.chosen}: a client's first steps take, with each, {told}. Name it to repeat the run bit for bit")


class Threads(Callback):
    """Runs a fit with the number of CPU threads that suits its clients, from before the codec is trained; checkpoints hold it.

    Whoever adds it puts torch's number back when all is done.
    """

    def __init__(self) -> None:
        self.chosen: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose, unless a checkpoint says how many there were."""
        self.chosen = self.chosen or choose_threads(cast("FederatedRun", pl_module))
        if self.chosen is not None:
            torch.set_num_threads(self.chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the number."""
        return {"chosen": self.chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the number of the run that goes on."""
        self.chosen = state_dict["chosen"]


def choose_threads(run: FederatedRun) -> int | None:
    """Return the number of CPU threads for the run's clients, alike in all processes; None where torch's own choice stays.

    It stays on a GPU, and for a large LightningModule, whose steps cannot be tried; a small one takes one thread: more make it hardly
    faster, and many times slower where another program wants a core.
    """
    most = min(torch.get_num_threads(), cores_of_a_process())
    if most == 1 or run.trainer.strategy.root_device.type != "cpu":
        return None
    if isinstance(run.network, LightningModule):
        return 1 if run.layout.dim <= CROWD else None
    model = run.local_model(run.data.augmentation)
    with run.trainer.precision_plugin.forward_context():
        one, several = time_threads(model, run.algorithm, partial(trial_tasks, run, model), most)
    chosen = int(from_first(torch.tensor(1 if several > (1 - THREADS_MARGIN) * one else most), torch.device("cpu")))
    told = f"with one {1000 * one:.3g} ms, with {most} up to {1000 * several:.3g} ms"
    rank_zero_info(f"Threads {chosen}: a client's first steps take {told}. Name it with --threads")
    return chosen


def trial_tasks(run: FederatedRun, model: LocalModel, count: int) -> list[ClientTask]:
    """Return new tasks of so many clients, spread over all; nothing of them is the run's own but their samples."""
    with_data = np.flatnonzero(run.data.client_sizes)
    rows = np.linspace(0, len(with_data) - 1, min(count, len(with_data))).astype(int)
    tasks = []
    for client in map(int, with_data[rows]):
        held = (*run.data.client_data(client), model.weights.clone(), model.buffers.clone())
        memory = Memory(server=run.algorithm.broadcast({}))
        tasks.append(ClientTask(client, *held, torch_generator(run.seed, "trial", client), memory=memory))
    return tasks
