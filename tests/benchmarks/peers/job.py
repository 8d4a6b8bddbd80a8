"""What every system is given, and how it reports. Needs torch alone: the peers' environments need no fedlight."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from resident import peak_rss_mb
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


@dataclass(frozen=True)
class Job:
    """A model with its initial weights, images ``[clients, samples, ...]``, labels ``[clients, samples]``, cohorts ``[rounds, cohort]``."""

    network: nn.Sequential
    x: Tensor
    y: Tensor
    cohorts: Tensor
    lr: float
    batch_size: int

    @property
    def steps(self) -> int:
        """Client steps of a round."""
        return self.cohorts.shape[1] * self.y.shape[1] // self.batch_size

    def save(self, path: Path) -> None:
        """Write the job for `load_job`."""
        torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, path)


@functools.cache
def load_job(path: Path) -> Job:
    """Return a job that this benchmark has written (it holds a pickled network), read once in a process."""
    return Job(**torch.load(path, weights_only=False))


@dataclass
class Report:
    """What a process measured: seconds of ``rounds`` rounds, and how far the first one moved the weights: was it the same work?"""

    rounds: int
    seconds: float
    first_move: float
    threads: int
    peak_rss_mb: float
    client_steps_per_second: float
    versions: dict[str, str]


class Watch:
    """Times the rounds after the warm-up.

    Args:
        network: the global model with its initial weights.
        warm: rounds before the clock starts, at least one.
        rounds: rounds that are timed.
        steps: client steps of a round.
    """

    def __init__(self, network: nn.Module, warm: int, rounds: int, steps: int) -> None:
        self.start = self._weights(network)
        self.warm = warm
        self.rounds = rounds
        self.steps = steps
        self.done = 0
        self.first_move = float("nan")
        self.begin = self.end = 0.0

    def round_ends(self, network: nn.Module) -> None:
        """Call this when a round is over, with the global model."""
        self.done += 1
        if self.done == 1:
            self.first_move = float((self._weights(network) - self.start).norm())
        if self.done == self.warm:
            self.begin = time.perf_counter()
        if self.done == self.warm + self.rounds:
            self.end = time.perf_counter()

    @staticmethod
    def _weights(network: nn.Module) -> Tensor:
        return parameters_to_vector(network.parameters()).detach().clone()

    def print(self, *packages: str, peak: float | None = None) -> None:
        """Print the report as one line; ``packages`` are those whose versions matter."""
        assert self.end > self.begin > 0, f"expected {self.warm + self.rounds} rounds but got {self.done}"
        assert self.first_move > 0, "expected rounds that train but the first one left the weights as they were"
        seconds, memory = self.end - self.begin, peak_rss_mb() if peak is None else peak
        versions = {package: version(package) for package in ("torch", *packages)}
        rate = self.rounds * self.steps / seconds
        report = Report(self.rounds, seconds, self.first_move, torch.get_num_threads(), memory, rate, versions)
        sys.stdout.write(f"\n{json.dumps(asdict(report))}\n")  # at once: another process writes to the same pipe
        sys.stdout.flush()


def options(description: str | None) -> argparse.Namespace:
    """Return the command line of a system's script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True, help="what `Job.save` wrote")
    parser.add_argument("--rounds", type=int, required=True, help="rounds that are timed")
    parser.add_argument("--warm", type=int, default=1, help="rounds before them")
    parser.add_argument("--processes", type=int, default=0, help="processes, where the system starts them itself (default: as it comes)")
    parser.add_argument("--workload", default="b1", help="fedlight alone: b1 or b2")
    parser.add_argument(
        "--engine",
        default="Sequential",
        help="fedlight: Sequential, Threaded or Vectorized; bare loop: `pooling` for fedlight's, `threads` for both",
    )
    parser.add_argument("--folder", default=".", help="fedlight alone: where the run's logs go")
    return parser.parse_args()
