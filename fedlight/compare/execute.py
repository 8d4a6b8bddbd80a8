"""Runs in worker processes: each process imports once and does one run after another. Finished runs are not repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlight.compare.plan import Run
from fedlight.core.errors import RoundFailedError

DONE_FILE = "done.json"
OUTPUT_FILE = "output.txt"
SUMMARY_FILE = "summary.json"

NEEDED = ("test_accuracy", "total_bytes")
"""What a summary must have to be compared; those of early versions have no total, and their runs are done again."""

Fit = Callable[[list[str]], str | None]
"""Runs `fedlight` with these arguments and returns the run's folder."""


@dataclass(frozen=True)
class Job:
    """A run with its configuration (JSON), its folder and the digest that shows whether it is already finished."""

    run: Run
    config: str
    folder: Path
    digest: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with ``error``, or with a folder and a summary."""

    run: Run
    folder: Path
    summary: dict[str, Any]
    error: str | None = None
    seconds: float = 0.0
    again: bool = False

    @property
    def ok(self) -> bool:
        """Whether the run has a result."""
        return self.error is None

    @property
    def told(self) -> str:
        """How it ended, in words."""
        if not self.ok:
            return f"failed: {self.error}"
        return f"{self.summary['test_accuracy']:.1%}" + (", finished before" if self.again else f" in {self.seconds:.0f} s")


def finished(job: Job) -> Outcome | None:
    """Return the outcome of an earlier run with the same configuration, or None."""
    try:
        done = json.loads((job.folder / DONE_FILE).read_text())
        folder = job.folder / done["folder"]
        summary = json.loads((folder / SUMMARY_FILE).read_text())
        whole = done["digest"] == job.digest and all(key in summary for key in NEEDED)
    except (OSError, ValueError, KeyError, TypeError):  # as of a file that is cut off, or of something else
        return None
    return Outcome(job.run, folder, summary, again=True) if whole else None


def execute(
    jobs: Iterable[Job], fit: Fit, workers: int, then: Callable[[Outcome], list[Job]], begin: Callable[[Run], None] = lambda run: None
) -> None:
    """Run jobs on ``workers`` processes; ``begin`` hears of each, ``then`` receives every outcome and returns further jobs.

    A run that fails, or kills its process, is an outcome too; the other runs continue.
    """
    waiting = deque(jobs)
    while waiting:
        running: dict[Future[Outcome], Job] = {}
        try:
            with _pool(workers) as pool:
                while waiting or running:
                    while waiting and len(running) < workers:
                        if (known := finished(waiting[0])) is not None:
                            waiting.popleft()
                            waiting.extend(then(known))
                            continue
                        running[pool.submit(_work, fit, waiting[0])] = waiting[0]
                        begin(waiting.popleft().run)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        running.pop(future)
                        waiting.extend(then(outcome))
        except BrokenProcessPool:
            for job in running.values():
                died = "its worker process died without an error message (killed, or out of memory)"
                waiting.extend(then(Outcome(job.run, job.folder, {}, died)))


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool that spawns its processes on first use, and kills them if the block raises an exception."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ignore Ctrl-C, and exit when the parent process exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(fit: Fit, job: Job) -> Outcome:
    """Do one run in a worker process, and mark it as finished."""
    job.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with _output_to(job.folder / OUTPUT_FILE):
        try:
            left = fit(["fit", "--config", job.config]) or ""
            summary = json.loads((Path(left) / SUMMARY_FILE).read_text()) if left else {}
            if "test_accuracy" not in summary:
                found = ", ".join(key for key in summary if key.startswith("test_")) or "no test metric"
                raise RoundFailedError(
                    f"Expected `test_accuracy` at the end of the run but it has {found}: log the metric to compare under this name in your "
                    f"module's `test_step`; what the run printed is in {job.folder / OUTPUT_FILE}"
                )
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Outcome(job.run, job.folder, {}, message, time.monotonic() - start)
    done = {"digest": job.digest, "folder": os.path.relpath(left, job.folder)}
    draft = job.folder / f"{DONE_FILE}.part"
    draft.write_text(json.dumps(done, indent=2) + "\n")
    draft.replace(job.folder / DONE_FILE)
    return Outcome(job.run, Path(left), summary, seconds=time.monotonic() - start)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect everything that this process prints to a file, also through earlier copies of the streams."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, (stream, copy) in enumerate(zip((sys.stdout, sys.stderr), kept, strict=True), start=1):
            stream.flush()
            os.dup2(copy, number)
            os.close(copy)
