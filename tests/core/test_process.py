"""Each in a process of its own: what the C library does with freed memory is decided once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from fedlight.core.process import keep_freed_memory
import torch
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.empty(250_000).fill_(1.0) for _ in range(40)]
        while blocks:
            blocks.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""

PAGES = 40 * 1_000_000 // 4096

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept on glibc alone")


def run(**variables: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment | variables, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.slow
def test_pages_are_asked_for_once() -> None:
    kept, faults = run()
    assert kept
    assert faults < PAGES, "forty megabytes, freed and allocated again, took their pages anew"


@pytest.mark.slow
def test_a_users_own_choice_stands() -> None:
    kept, faults = run(MALLOC_MMAP_THRESHOLD_="65536")
    assert not kept
    assert faults > 10 * PAGES
