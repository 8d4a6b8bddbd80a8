"""The engine and the number of threads that are fastest for a run on this machine, found by training a few clients with each."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from fedlight.clients.algorithms import Algorithm
from fedlight.clients.engine import Batch, ClientTask, Engine, Sequential, Trained, Vectorized
from fedlight.clients.local_model import LocalModel, ends_after
from fedlight.clients.threaded import Threaded
from fedlight.core.errors import LocalTrainingError
from fedlight.core.process import cores_of_a_process
from fedlight.core.random import untouched_generators

log = logging.getLogger(__name__)

CLIENT = 0.1  # seconds that a client of a trial takes at most, or three steps: a silo's local epoch may take minutes
CLIENTS = 0.1  # seconds that the clients of a trial take together, one after another, at least
PASSES = 6  # of a trial at most: what else the machine does makes some of them slow
BUDGET = 0.6  # seconds of a trial after which there is no further pass, but for a second one, because the first compiles kernels
THREAD_PASSES = 4  # of a trial of threads, the first of which does not count
LONG = 5.0  # seconds of a first pass after which there is no second
FAR = 4.0  # times the best one's time: who takes longer takes no further part
MARGIN = 0.05  # share of the time that another engine must save
THREADS_MARGIN = 0.2  # share of the time that further threads must save: they are not for nothing, other runs may want the cores
CROWD = 1 << 19  # parameters up to which many clients fit into a CPU's memory at once and may gain from it

NAMES = ("Sequential", "Threaded", "Vectorized")
"""The engines to choose from, the one to stay with first."""

Tasks = Callable[[int], list[ClientTask]]
"""Makes new tasks of so many clients, the same ones every time."""


def choose(seconds: Mapping[str, float], margin: float = MARGIN) -> str:
    """Return the name with the least seconds; a later one must save a share of ``margin`` to take an earlier one's place.

    >>> choose({"Sequential": 1.0, "Threaded": 0.97}), choose({"Sequential": 1.0, "Threaded": 0.6, "Vectorized": 0.59})
    ('Sequential', 'Threaded')
    """
    first, *others = seconds
    for name in others:
        if seconds[name] < (1 - margin) * seconds[first]:
            first = name
    return first


class Auto(Engine):
    """The fastest engine for a run on this machine: a few clients are trained with each that can train the run, before its first round.

    What they learn is thrown away: a run is bit for bit the one that names the chosen engine. Checkpoints hold the choice. Another machine
    may choose another engine, whose updates differ by rounding: name the engine where two runs must end with the same bits.

    Attributes:
        chosen: name of the chosen engine; nothing before it is chosen, and clients are trained one after another until then.
    """

    def __init__(self) -> None:
        self.chosen = ""
        self.candidates: dict[str, Engine] = {"Sequential": Sequential()}

    def train(self, model: LocalModel, algorithm: Algorithm, tasks: Iterable[ClientTask], round: int) -> Trained:
        """Yield what the chosen engine yields."""
        return self.candidates[self.chosen or "Sequential"].train(model, algorithm, tasks, round)

    def check(self, make_model: Callable[[], LocalModel], algorithm: Algorithm, data: Batch, personal: bool, device: torch.device) -> None:
        """Find the engines that can train this run; it is never refused."""
        possible: list[Engine] = [Threaded()] if device.type == "cpu" and cores_of_a_process() > 1 else []
        if device.type != "cpu" or make_model().flat.layout.dim <= CROWD:
            possible.append(Vectorized())
        self.candidates = {"Sequential": Sequential()}
        for engine in possible:
            name = type(engine).__name__
            try:
                with untouched_generators([device] if device.type == "cuda" else []), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    engine.check(make_model, algorithm, data, personal, device)
            except Exception as error:  # a network may fail in any way where it is run in a way that it was not made for
                log.debug("%s cannot train this run: %s", name, error)
            else:
                self.candidates[name] = engine

    def take(self, name: str) -> None:
        """Choose an engine by name, such as that of a checkpoint, if it can train the run."""
        if name in self.candidates:
            self.chosen = name

    def time(self, model: LocalModel, algorithm: Algorithm, tasks: Tasks, cohort: int) -> dict[str, float]:
        """Return the seconds that a client takes with each engine, infinity where it cannot train; nothing of ``model`` changes.

        ``cohort`` is the number of clients in a round, of which a trial has no more.
        """
        kind = ends_after(_steps(model, algorithm, tasks))
        one = min(seconds_of(Sequential(), _copy(model, kind), algorithm, tasks(1)) for _ in range(2))
        clients = min(cohort, max(2 * cores_of_a_process(), math.ceil(CLIENTS / one)))

        def timer(engine: Engine) -> Callable[[], float]:
            own = _copy(model, kind)
            return lambda: seconds_of(engine, own, algorithm, tasks(clients))

        found = race({name: timer(engine) for name, engine in self.candidates.items()})
        return {name: found.get(name, math.inf) / clients for name in NAMES}


def race(timers: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return the least of the seconds that each timer returns; they take turns, and who is far behind stays out of further passes."""
    start = time.perf_counter()
    found = {name: timer() for name, timer in timers.items()}
    for number in range(1, PASSES):
        if time.perf_counter() - start > (LONG if number == 1 else BUDGET):
            break
        best = min(found.values())
        for name, timer in timers.items():
            if found[name] <= FAR * best:
                found[name] = min(found[name], timer())
    return found


def engine_name(engine: Engine) -> str:
    """Return the name of the engine that trains clients: the chosen one of an `Auto`."""
    return engine.chosen or "Sequential" if isinstance(engine, Auto) else type(engine).__name__


def time_threads(model: LocalModel, algorithm: Algorithm, tasks: Tasks, more: int) -> tuple[float, float]:
    """Return the seconds of a client's first steps with one torch thread, at best, and with ``more``, at worst.

    The worst counts because threads that wait for each other stand still whenever another program takes a core. torch's number is put back.
    """
    before, copy = torch.get_num_threads(), _copy(model, ends_after(_steps(model, algorithm, tasks)))

    def timer(count: int) -> float:
        torch.set_num_threads(count)
        return seconds_of(Sequential(), copy, algorithm, tasks(1))

    start, best, worst = time.perf_counter(), math.inf, 0.0
    try:
        for number in range(THREAD_PASSES):
            best, last = min(best, timer(1)), timer(more)
            worst = max(worst, last) if number else 0.0  # the first pass starts the threads
            if last > best and (number or time.perf_counter() - start > BUDGET):
                return best, max(worst, last)
        return best, worst
    finally:
        torch.set_num_threads(before)


def seconds_of(engine: Engine, model: LocalModel, algorithm: Algorithm, tasks: Sequence[ClientTask]) -> float:
    """Return the seconds in which an engine trains clients whose results nobody takes; infinity if it has no memory or fails."""
    device = model.weights.device
    with untouched_generators([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an engine that is not chosen; the run says those of its own
        start = time.perf_counter()
        try:
            for _ in engine.train(model, algorithm, tasks, 0):
                pass
        except (torch.OutOfMemoryError, LocalTrainingError):  # a run that cannot go on will say so itself
            return math.inf
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start


def _steps(model: LocalModel, algorithm: Algorithm, tasks: Tasks) -> int:
    """Return how many steps of a client to time: as many as it has time for."""
    one = _copy(model, ends_after(1))
    seconds = min(seconds_of(Sequential(), one, algorithm, tasks(1)) for _ in range(2))
    return max(3, int(CLIENT / seconds))


def _copy(model: LocalModel, kind: type[LocalModel]) -> LocalModel:
    return kind(model.network, model.objective, model.weights.device, model.augment)
