"""`fedlight doctor`: what is installed, what the machine has, what is missing and the command that adds it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from fedlight.console.configs import folder, shipped
from fedlight.console.parser import OneSentence
from fedlight.subcommands import SUBCOMMANDS

_OF_DEVELOPERS = ("dev", "test")  # extras
_DATA = {
    "MNIST": "MNIST/raw",
    "CIFAR-10": "cifar-10-batches-py",
    "CIFAR-10 as arrays": "cifar10_20k.npz",
    "writers of MNIST": "mnist_writers.npz",
}


def requirements(distribution: str = "fedlight") -> dict[str, list[Requirement]]:
    """Return what a distribution requires by extra; "" is what it always requires."""
    found: dict[str, list[Requirement]] = {extra: [] for extra in ("", *(metadata.metadata(distribution).get_all("Provides-Extra") or []))}
    for text in metadata.requires(distribution) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found[""].append(requirement)
            continue
        for extra in found:
            if extra and marker.evaluate({"extra": extra}):
                found[extra].append(requirement)
    return found


def shortfall(wanted: list[Requirement]) -> list[str]:
    """Return what is wrong with these requirements: the missing and the too old ones, each with the version that is there."""
    wrong = []
    for requirement in wanted:
        try:
            there = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} where {requirement.specifier} is wanted")
    return wrong


def report() -> Iterator[tuple[str, str]]:
    """Yield the lines of the report: what, and how it is."""
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "fedlight", f"{metadata.version('fedlight')} ({Path(__file__).parents[1]})"
    wanted = requirements()
    wrong = shortfall(wanted[""])
    yield "requirements", "; ".join(wrong) + ": pip install --upgrade fedlight" if wrong else "all there"
    for extra in sorted(set(wanted) - {"", *_OF_DEVELOPERS}):
        wrong = shortfall([one for one in wanted[extra] if one.name != "fedlight"])
        yield f"extra {extra}", "; ".join(wrong) + f": pip install 'fedlight[{extra}]'" if wrong else "all there"
    yield from _machine()
    yield "configurations", f"{len(shipped())} in {folder()}: `fedlight configs` lists them"
    yield "data", _data()
    yield "runs go to", _writable(Path("logs"))


def _machine() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except Exception as error:  # a broken installation is what this report is for
        yield "torch", f"cannot be imported ({error}): install torch and torchvision from one place, together"
        return
    named = os.environ.get("OMP_NUM_THREADS")
    yield "versions", ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "jsonargparse", "tensorboard"))
    yield "CPU", (
        f"{cores} cores, {torch.get_num_threads()} torch threads" + (f" by OMP_NUM_THREADS={named}" if named else "")
        + "; `fedlight fit` chooses how many of them a run takes, `--threads` names it"
    )  # fmt: skip
    if torch.cuda.is_available():
        yield "GPU", ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    elif torch.backends.mps.is_available():
        yield "GPU", "Apple's, by `--trainer.accelerator mps`"
    else:
        yield "GPU", "none that torch can use: runs take the CPU"


def _data() -> str:
    root = Path(os.environ.get("FEDLIGHT_DATA") or "data")
    named = "FEDLIGHT_DATA" if os.environ.get("FEDLIGHT_DATA") else "FEDLIGHT_DATA is not set"
    found = [name for name, place in _DATA.items() if (root / place).exists()]
    missing = [name for name in _DATA if name not in found]
    held = f"has {', '.join(found)}" if found else "has none of the data sets" if root.is_dir() else "does not exist yet"
    lacks = f"; not there: {', '.join(missing)} (a run downloads MNIST and CIFAR-10 itself; the digits need no file)" if missing else ""
    return f"{root} ({named}) {held}{lacks}"


def _writable(place: Path) -> str:
    parent = place if place.is_dir() else place.absolute().parent
    return f"{place.absolute()}" + ("" if os.access(parent, os.W_OK) else ", which cannot be written: change the current folder")


def command(args: Sequence[str]) -> None:
    """Print the report; raises ``ConfigurationError`` if there are arguments: it takes none."""
    OneSentence("fedlight doctor", description=SUBCOMMANDS["doctor"]).parse_args(args)
    lines = list(report())
    width = max(len(what) for what, _ in lines)
    for what, how in lines:
        print(f"{what:{width}}  {how}")
