"""`fedlight flower demo`: a SuperLink and three nodes on this machine, with TLS and node keys; trains the digits and stops everything."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fedlight.core.errors import ConfigurationError
from fedlight.core.progress import waiting
from fedlight.flower import program
from fedlight.flower.commands import NAMES
from fedlight.flower.files import write_lab
from fedlight.flower.processes import answers, end_session
from fedlight.flower.run import flwr, listed, require_completed, stream

START = 120.0
"""Seconds that the SuperLink and the nodes have to start, on a busy machine."""


def demonstrate(folder: Path | None, rounds: int) -> int:
    """Run the demonstration and return its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: with everything stopped
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="fedlight-") as root:
        start, lab = time.monotonic(), Lab(Path(root) / "lab")
        kept = f": {lab.root}" if folder else ""  # else it goes when the demonstration ends
        try:
            lab.start()
            print(f"SuperLink and {len(NAMES)} nodes are up after {time.monotonic() - start:.0f} s{kept}", flush=True)
            status = lab.run("--trainer.max_steps", str(rounds))
            print(lab.traffic(), flush=True)
            require_completed(lab.past[-1])
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        finally:
            with waiting("Stopping the nodes and the SuperLink"):
                lab.stop()
        print(f"{time.monotonic() - start:.0f} s in all; everything that was started is stopped", flush=True)
        return status


class Lab:
    """A deployment on this machine, whose files are in a new folder ``root``."""

    def __init__(self, root: Path, names: Sequence[str] = NAMES) -> None:
        self.root = root
        self.names = list(names)
        port, *ports = free_ports(1 + len(names))
        self.address = f"127.0.0.1:{port}"
        write_lab(root, names, self.address, ports)
        self.environment = {**os.environ, "FLWR_HOME": str(root / "flower"), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self.past: list[dict[str, Any]] = []  # the runs, as Flower told of them after the last one
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the SuperLink, register the nodes, start them, and wait until all are online."""
        self.start_superlink()
        for name in self.names:
            with waiting(f"Registering {name}"):
                self.flwr("supernode", "register", str(self.root / "keys" / f"{name}.node.pub"), "lab", "--name", name)
            self.start_node(name)
        self.wait(lambda: self.online() >= len(self.names), "the nodes to be online")

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers."""
        port = self.address.rpartition(":")[2]
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "superlink.crt", "--ssl-keyfile", "superlink.key"]
        own = ["--host", "127.0.0.1", "--port", port, "--enable-supernode-auth", "--database", "state.db"]
        self.launch("superlink", [sys.executable, "-m", "fedlight", "flower", "superlink", *own, *tls])
        self.wait(lambda: answers(int(port)), "the SuperLink to answer")

    def start_node(self, name: str) -> None:
        """Start a node."""
        self.launch(name, [sys.executable, "-m", "fedlight", "node", str(self.root / f"{name}.yaml")])

    def launch(self, name: str, command: list[str]) -> None:
        """Start a program in a session of its own; what it says goes to a file."""
        with (self.root / f"{name}.log").open("ab") as file:
            self._running[name] = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Wait for something; raises ``ConfigurationError`` if it does not happen in time, or a program ended meanwhile."""
        end = time.monotonic() + START
        with waiting(f"Waiting for {what}"):
            while not until():
                for name, process in self._running.items():
                    if process.poll() is not None:
                        raise ConfigurationError(f"Expected {name} to run but it ended with {process.returncode}: {self.said(name)}")
                if time.monotonic() > end:
                    raise ConfigurationError(f"Expected {what} within {START:.0f} s but it took longer: see the .log files in {self.root}")
                time.sleep(0.3)

    def said(self, name: str, lines: int = 3) -> str:
        """Return the last lines of what a program said."""
        return " / ".join((self.root / f"{name}.log").read_text(errors="replace").strip().splitlines()[-lines:])

    def flwr(self, *arguments: str) -> str:
        """Run a command of Flower's and return what it printed."""
        return flwr(self.environment, *arguments)

    def runs(self) -> list[dict[str, Any]]:
        """Return what Flower says of all runs, the newest last."""
        found: list[dict[str, Any]] = listed(self.environment, "list", "lab")["runs"]
        return sorted(found, key=lambda run: run["pending-at"])

    def online(self) -> int:
        """Return how many nodes are online."""
        return sum(node["status"] == "online" for node in listed(self.environment, "supernode", "list", "lab")["nodes"])

    def run(self, *options: str, resume: bool = False) -> int:
        """Run the app, show what both ends say, and return the exit status: 0 if it ran to its end."""
        config = [f'options="{" ".join(options)}"', f"resume={str(resume).lower()}"]
        command = [program("flwr"), "run", str(self.root / "app"), "lab", "--stream", "--run-config", " ".join(config)]
        read = {name: (self.root / f"{name}.log").stat().st_size for name in self.names}
        status = stream(command, self.environment, lambda number: None, lambda: self._show(read))
        with waiting("Asking the SuperLink how the run ended"):
            self.past = self.runs()
        return status or int(self.past[-1]["status"] != "finished:completed")

    def _show(self, read: dict[str, int]) -> None:
        """Print what the nodes have said since."""
        for name in self.names:
            with (self.root / f"{name}.log").open("rb") as file:
                file.seek(read[name])
                for line in file.read().decode(errors="replace").splitlines():
                    print(f"  [{name}] {line}", flush=True)
                read[name] = file.tell()

    def traffic(self) -> str:
        """Return a line about the bytes that Flower carried."""
        both = [run["network-traffic"] for run in self.past]
        up, down = (sum(run[name] for run in both) for name in ("inbound-bytes", "outbound-bytes"))
        return f"Flower carried {up:,} bytes up and {down:,} bytes down, its own part of every message included, HTTP headers not."

    def stop(self) -> None:
        """Stop the nodes, then the SuperLink, with all that they started."""
        self.end(*(name for name in self._running if name != "superlink"))
        self.end("superlink")

    def end(self, *names: str) -> None:
        """End programs together, with all that they started."""
        ended = [self._running.pop(name) for name in names if name in self._running]
        for process in ended:
            process.terminate()
        for process in ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            end_session(process)

    def kill(self, name: str) -> None:
        """Kill a program and all that it started."""
        process = self._running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports
