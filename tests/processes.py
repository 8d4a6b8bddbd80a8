"""Forked processes: a copy of this one has imported everything already, where a fresh interpreter needs seconds to do so."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

LONGEST = 240.0
"""Seconds after which a forked process hangs rather than works."""


@dataclass
class Forked:
    """A process that this one forked; its output goes to the file ``log``."""

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal that killed it, or None while it runs."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = LONGEST) -> int:
        """Return the exit code; a process that hangs is killed, and the test fails with its last words."""
        wait_until(lambda: self.poll() is not None, [self], seconds)
        assert self.code is not None
        return self.code

    def last_words(self) -> str:
        """Return the end of what the process has printed."""
        return self.log.read_text()[-3000:]


def wait_until(condition: Callable[[], bool], processes: list[Forked], seconds: float = LONGEST) -> None:
    """Wait for something that processes do; if it takes longer, they are killed and the test fails with their last words."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            for process in processes:
                process.send(signal.SIGKILL)
            pytest.fail(f"not done after {seconds} seconds:\n" + "\n".join(process.last_words() for process in processes))
        time.sleep(0.01)


def fork(work: Callable[[], object], log: Path, variables: Mapping[str, str] | None = None) -> Forked:
    """Run ``work`` in a copy of this process, with these environment variables beside its own; an exception ends it with code 1."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    assert torch.get_num_threads() == 1, "a copy of a process has none of its threads, and would wait for them"
    if pid := os.fork():
        return Forked(pid, log)
    code = 1
    try:
        gc.freeze()  # what the first process will throw away is its own to tidy up after
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        faulthandler.dump_traceback_later(LONGEST - 5, file=sys.stderr)
        os.environ.update(variables or {})
        work()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # pytest's own ending is the first process's


def fork_two(work: Callable[[], Any], folder: Path) -> list[Forked]:
    """Run ``work`` in two forked processes, as Lightning's "ddp" finds them when they are started for it; results go to ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}

    def member(rank: int) -> None:
        rank_zero_only.rank = rank
        torch.save(work(), folder / f"result_{rank}.pt")
        if distributed.is_initialized():
            distributed.barrier()  # rank 0 keeps the store that the other's threads still talk to: neither leaves before both are done
            distributed.destroy_process_group()

    return [
        fork(lambda rank=rank: member(rank), folder / f"output_{rank}.txt", {**place, "LOCAL_RANK": str(rank)})  # type: ignore[misc]
        for rank in range(2)
    ]


def in_two_processes(work: Callable[[], Any], folder: Path) -> list[Any]:
    """Run ``work`` in two forked processes and return both results, by rank."""
    pair = fork_two(work, folder)
    wait_until(lambda: all(process.poll() == 0 for process in pair) or any(process.poll() for process in pair), pair)
    if failed := [process for process in pair if process.poll()]:  # the other waits for it in vain
        for process in pair:
            process.send(signal.SIGKILL)
            process.wait()
        pytest.fail(f"a process ended with code {failed[0].code}:\n{failed[0].last_words()}")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(2)]
