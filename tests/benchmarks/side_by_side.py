"""B1 and B2 beside pfl-research, Flower's simulation and FedLab: each system in processes of its own, in turn."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from environments import Unavailable, last_error, peer_python
from lightning.pytorch import seed_everything
from peers.job import Job
from throughput import BATCH, LR, STEPS, WORKLOADS, Workload, load_data
from torch import nn

from fedlight.data import FederatedDataModule

NAMES = {"b1peers": "b1", "b2peers": "b2"}
SECONDS = 600  # that one run may take
WITH_POOLING = "2 processes of 1 thread, fedlight's pooling"
THREADS = "clients in threads"
SAME_WORK = 0.2  # of how far the bare loop's first round moves: cohorts and batch orders are not the same in every system


@dataclass(frozen=True)
class System:
    """A configuration of a system: ``module`` is its script, ``peer`` its environment, 0 threads are as many as come by themselves."""

    name: str
    variant: str
    module: str
    peer: str = ""
    processes: int = 1
    threads: int = 0
    torchrun: bool = False
    rounds: int = 0  # 0 for the workload's
    warm: int = 0
    engine: str = ""  # fedlight's (nothing for the one it has by itself); the bare loop's is torch's layers, `pooling` or `threads`
    only: str = ""  # the benchmark that it can be run on: nothing for all

    @property
    def title(self) -> str:
        """What the table calls it."""
        return f"{self.name}, {self.variant}"

    @property
    def reports(self) -> int:
        """How many processes print a line: each, but Flower's driver for all of Ray's."""
        return 1 if self.module == "flower" else self.processes


def _variants(name: str, module: str, peer: str = "", torchrun: bool = False) -> list[System]:
    """Return a system as it comes, on one thread, and in two processes of one thread each."""
    return [
        System(name, "as it comes", module, peer),
        System(name, "1 thread", module, peer, threads=1),
        System(name, "2 processes of 1 thread", module, peer, processes=2, threads=1, torchrun=torchrun),
    ]


SYSTEMS: tuple[System, ...] = (
    *_variants("fedlight", "fedlight"),
    System("fedlight", THREADS, "fedlight", threads=1, engine="Threaded"),
    System("fedlight", "1 thread, vectorised", "fedlight", threads=1, engine="Vectorized", only="b1"),  # B2's dropout is refused
    System("fedlight", "2 processes of 1 thread, vectorised", "fedlight", processes=2, threads=1, engine="Vectorized", only="b1"),
    *_variants("bare loop", "bare", torchrun=True),
    System("bare loop", WITH_POOLING, "bare", processes=2, threads=1, torchrun=True, engine="pooling", only="b2"),
    System("bare loop", f"{THREADS}, fedlight's pooling", "bare", threads=1, engine="threads"),
    *_variants("pfl", "pfl", "pfl", torchrun=True),
    *_variants("FedLab", "fedlab", "fedlab")[:2],
    System("Flower", "as it comes", "flower", "flower", rounds=2, warm=1),
    System("Flower", "2 processes", "flower", "flower", processes=2, rounds=2, warm=1),
)


def chosen(titles: str) -> tuple[System, ...]:
    """Return the systems of these titles, separated by semicolons; all if there is none.

    Raises:
        ValueError: if there is no system of a title.
    """
    wanted = [title.strip() for title in titles.split(";") if title.strip()]
    known = {system.title: system for system in SYSTEMS}
    if unknown := [title for title in wanted if title not in known]:
        raise ValueError(f"Expected titles of {list(known)} but got {unknown}")
    return tuple(known[title] for title in wanted) or SYSTEMS


TARGETS = {
    "b1": (("pfl", "as it comes", 4.0), ("pfl", "", 2.0), ("Flower", "as it comes", 100.0)),
    "b2": (("pfl", "as it comes", 1.3), ("pfl", "", 1.05), ("bare loop", "", 0.95)),
}
"""(system, variant or nothing for its best, how many times its client steps per second fedlight should do)."""

METHOD = (
    "Side by side: the same initial weights and the same clients of 50 samples for all; each run is a process (or two) of its own, its "
    "warm-up rounds are not timed, runs alternate. fedlight, the bare loop and pfl train the same cohorts, the others draw their own. "
    "B2: fedlight pools with a quicker layer, bit for bit the same numbers; the bare loop has torch's, in two processes and in threads "
    "fedlight's too. "
    "`as it comes`: threads and processes that the system chooses by itself. Ratios are medians over repeats; memory is the sum of the "
    "peaks of a system's processes (Flower: Ray's too). How far the first round moves the weights is checked to be as in the bare loop.",
)


def measure(name: str, repeats: int, systems: Sequence[System] = SYSTEMS, work: Workload | None = None) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each system that can be run, and lines on the data and on what was skipped."""
    work, data = work or WORKLOADS[name], load_data()
    skipped: dict[str, str] = {}
    reports: dict[System, list[dict[str, Any]]] = {system: [] for system in systems}
    with TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.pt"
        make_job(work, data).save(job)
        able = [system for system in systems if system.only in ("", name)]
        for repeat in range(repeats):
            for system in able[:: -1 if repeat % 2 else 1]:
                if system.title in skipped:
                    continue
                try:
                    reports[system].append(run(system, job, name, work))
                except Unavailable as error:
                    skipped[system.title] = str(error)
                    print(f"skipped {system.title}: {error}", flush=True)
    rows = [make_row(work, system, found) for system, found in reports.items() if found and system.title not in skipped]
    bare = best(rows, "bare loop")
    if bare is not None:
        for row in rows:
            row["ratio_to_bare"] = ratio(row, bare)
    notes = [f"{title(work)}: {data.source.name}", *(f"skipped {system}: {reason}" for system, reason in skipped.items())]
    return rows, "; ".join([*notes, *unequal(rows)])


def make_job(work: Workload, data: FederatedDataModule) -> Job:
    """Return the workload as plain tensors and torch's own layers, which a peer can load without fedlight."""
    seed_everything(0, workers=True, verbose=False)
    network = work.network()
    plain = nn.Sequential(*(layer for layer in network.modules() if not list(layer.children())))
    rows = torch.tensor([data.train_partition[client].tolist() for client in range(data.num_population)])
    assert torch.equal(network.eval()(data.x[:2]), plain.eval()(data.x[:2])), f"expected {work.title} to be a sequence of layers"
    cohorts = torch.tensor([data.cohort(number).tolist() for number in range(work.warm + work.rounds)])
    return Job(plain.train(), data.x[rows], data.y[rows], cohorts, LR, BATCH)


def run(system: System, job: Path, name: str, work: Workload) -> dict[str, Any]:
    """Run a system once and return what its processes report: the slowest one's time, the sum of their memory.

    Raises:
        Unavailable: if it cannot be installed, fails, or takes too long.
    """
    python = str(peer_python(system.peer)) if system.peer else sys.executable
    with TemporaryDirectory() as folder:
        command = [python, "-m"]
        if system.torchrun and system.processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={system.processes}", "-m"]
        command += [f"peers.{system.module}", "--job", str(job), "--workload", name, "--folder", folder]
        command += ["--rounds", str(system.rounds or work.rounds), "--warm", str(system.warm or work.warm)]
        command += ["--engine", system.engine] if system.engine else []
        output = execute([*command, "--processes", str(system.processes)], environment(system))
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines() if line.startswith('{"rounds"')]
    if len(lines) != system.reports:
        raise Unavailable(f"{len(lines)} of {system.reports} processes reported: {last_error(output)}")
    slowest = max(lines, key=lambda line: line["seconds"])
    return slowest | {"peak_rss_mb": sum(line["peak_rss_mb"] for line in lines)}


def environment(system: System) -> dict[str, str]:
    """Return the environment variables of a run: this process's, with the system's threads and without reports to elsewhere."""
    variables = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": str(system.threads)} if system.threads else {}
    return variables | threads | {"PYTHONPATH": path, "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def execute(command: list[str], variables: dict[str, str]) -> str:
    """Run a command in a session of its own, which is ended with all its processes when time is up, and return its output."""
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Unavailable(f"it took more than {SECONDS} s") from None
    if process.returncode:
        raise Unavailable(f"it ended with status {process.returncode}: {last_error(output)}")
    return output


def make_row(work: Workload, system: System, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one configuration's row: medians of its runs, which are kept in ``runs`` (rounds per second)."""
    rate = statistics.median(report["client_steps_per_second"] for report in reports)
    return {
        "benchmark": title(work),
        "system": system.title,
        "client_steps_per_second": rate,
        "rounds_per_second": rate / STEPS,
        "ratio_to_bare": None,
        "peak_rss_mb": statistics.median(report["peak_rss_mb"] for report in reports),
        "processes": system.processes,
        "threads": reports[0]["threads"],
        "versions": reports[0]["versions"],
        "first_move": reports[0]["first_move"],
        "runs": [report["client_steps_per_second"] / STEPS for report in reports],
    }


def title(work: Workload) -> str:
    """Return what the table calls the benchmark."""
    return f"{work.title}, side by side"


def best(rows: list[dict[str, Any]], name: str, variant: str = "") -> dict[str, Any] | None:
    """Return the fastest configuration of a system, or the one of that name; None if it was not run."""
    known = [row for row in rows if row["system"].startswith(f"{name}, {variant}")]
    return max(known, key=lambda row: row["client_steps_per_second"], default=None)


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return how many times as fast one row's system is as another's: the median over repeats, run by run."""
    return float(statistics.median(mine / other for mine, other in zip(ours["runs"], theirs["runs"], strict=True)))


def unequal(rows: list[dict[str, Any]]) -> list[str]:
    """Say which systems cannot have done the same work: those whose first round moves otherwise than the bare loop's."""
    bare = best(rows, "bare loop")
    if bare is None:
        return []
    wanted = bare["first_move"]
    return [
        f"NOT THE SAME WORK: {row['system']} moves the weights by {row['first_move']:.3f} in its first round, the bare loop by {wanted:.3f}"
        for row in rows
        if not abs(row["first_move"] - wanted) <= SAME_WORK * wanted
    ]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Say of every target whether fedlight meets it, in the configuration that suits it best on this machine."""
    lines = []
    for name, targets in TARGETS.items():
        found = [row for row in rows if row["benchmark"] == title(WORKLOADS[name])]
        ours, plain = best(found, "fedlight"), best(found, "fedlight", "as it comes")
        for other, variant, needed in targets:
            theirs = best(found, other, variant)
            if ours is None or theirs is None:
                continue
            times, met = ratio(ours, theirs), "met" if ratio(ours, theirs) >= needed else "NOT met"
            itself = f" (as it comes {ratio(plain, theirs):.2f})" if plain else ""
            lines.append(
                f"{found[0]['benchmark']}: {ours['system']} does {times:.2f} times the client steps of {theirs['system']}{itself}, "
                f"wanted {needed}: {met}"
            )
    return lines
