"""`fedlight flower run`: `flwr run`, and how the run ended for an exit status."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlight.core.errors import ConfigurationError
from fedlight.core.progress import waiting
from fedlight.flower import program

STARTED = re.compile(r"Successfully started run (\d+)")


def run_app(arguments: Sequence[str]) -> int:
    """Run `flwr run` with these arguments and return the exit status; raises ``ConfigurationError`` with `--stream` if the run failed."""
    command = [program("flwr"), "run", *arguments]
    if "--stream" not in arguments:
        os.execv(command[0], command)
    link = connection(arguments)
    started: list[str] = []
    try:
        status = stream(command, os.environ, started.append)
    except KeyboardInterrupt:
        named = " ".join([*started, *link])
        print(f"The run goes on: `flwr log {named} --stream` shows it again, `flwr stop {named}` stops it", file=sys.stderr)
        return 130
    if status == 0 and started:
        with waiting("Asking the SuperLink how the run ended"):
            ended = listed(os.environ, "list", *link, "--run-id", started[0])["runs"][0]
        require_completed(ended)
    return status


def connection(arguments: Sequence[str]) -> list[str]:
    """Return the connection that the arguments of `flwr run` name, or nothing."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("named", nargs="*")
    options.add_argument("--stream", action="store_true")
    for name in (("--run-config", "-c"), ("--federation",), ("--federation-config",), ("--format",)):
        options.add_argument(*name)
    given, _ = options.parse_known_intermixed_args(arguments)
    return list(given.named[1:2])  # after the app


def stream(
    command: Sequence[str], environment: Mapping[str, str], started: Callable[[str], object], between: Callable[[], None] = lambda: None
) -> int:
    """Show what `flwr run --stream` says, and return its status.

    ``started`` is given the number of the run; ``between`` is called after every line.
    """
    unbuffered = {**environment, "PYTHONUNBUFFERED": "1"}
    with (
        waiting("The run is on its way") as lines,
        subprocess.Popen(command, env=unbuffered, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.heard()
                if found := STARTED.search(line):
                    started(found[1])
                between()
        except BaseException:
            process.terminate()
            raise
    between()
    return process.returncode


def listed(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Return what a command of Flower's prints as JSON."""
    found: dict[str, Any] = json.loads(flwr(environment, *arguments, "--format", "json"))
    return found


def flwr(environment: Mapping[str, str], *arguments: str) -> str:
    """Run a command of Flower's and return what it printed."""
    done = subprocess.run([program("flwr"), *arguments], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ConfigurationError(f"Expected flwr {' '.join(arguments[:2])} to work but: {(done.stdout + done.stderr).strip()[-500:]}")
    return done.stdout


def require_completed(run: Mapping[str, Any]) -> None:
    """Raise ``ConfigurationError`` unless a run, as `flwr list` describes it, ended as it should."""
    if run["status"] != "finished:completed":
        why = str(run.get("status-details") or "").strip()
        raise ConfigurationError(
            f"Expected run {run['run-id']} to complete but it is {run['status']}{f' ({why})' if why else ''}: what it said last is above. "
            "Mend that and run it again; --run-config 'resume=true' goes on from its newest checkpoint"
        )
