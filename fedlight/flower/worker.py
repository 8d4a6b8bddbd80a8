"""`fedlight node`: a SuperNode, and beside it a process that has imported everything and forks for each message.

By default Flower starts a Python process for every message, which imports torch before it reads the first byte. Flower's own switch
`--isolation process` lets another program run the messages, and this is one. The app's own code is neither unpacked nor run here: every
message is answered by `fedlight.flower.client`. Everything of Flower's that is no public interface is in this file.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx
import torch
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp as flower

from fedlight.core.errors import ConfigurationError, DataError
from fedlight.core.files import write_private
from fedlight.core.progress import waiting
from fedlight.deploy.files import read_section, require_file
from fedlight.deploy.keys import require_key
from fedlight.deploy.settings import Parts, build
from fedlight.flower import client, program
from fedlight.flower.processes import StopError, end, require_free, stoppable

log = logging.getLogger("fedlight.node")

POLL = 0.1
AGAIN = 5.0
"""Seconds between two starts of a SuperNode."""

LASTED = 60.0
"""Seconds after which a SuperNode that still runs has joined: on a busy machine one that is refused takes half of them to say so."""

REFUSED = 90.0
"""Seconds for which a SuperNode that exits at once is started again: a SuperLink refuses a crashed node's key for about a minute."""


@dataclass
class Link:
    """How a node reaches its SuperLink: the section `flower` of `node.yaml`.

    Args:
        superlink: Address of the SuperLink, as host:port.
        key: File of the node's private key (EC, OpenSSH's form), whose public half is registered at the SuperLink.
        root_certificates: File of the certificate authority that signed the SuperLink's certificate (the system's if not given).
        insecure: Whether to do without TLS: on a machine of one's own only.
        port: Port on this machine, on 127.0.0.1, that SuperNode and worker talk through.
    """

    superlink: str
    key: str | None = None
    root_certificates: str | None = None
    insecure: bool = False
    port: int = 9094

    @classmethod
    def read(cls, path: Path) -> Link:
        """Return what a `node.yaml` says; raises ``ConfigurationError`` if something is wrong."""
        link = read_section(path, "flower", cls)
        if not re.fullmatch(r"[^/]+:\d+", link.superlink):
            raise ConfigurationError(
                f"Expected flower.superlink in {path} to be host:port, such as fl.example.org:8000, but got {link.superlink}"
            )
        for name in ("key", "root_certificates"):
            if (value := getattr(link, name)) is not None:
                found = path.parent / Path(value).expanduser()
                require_file(path, f"flower.{name}", found)
                setattr(link, name, str(found))
        if link.key is not None:
            require_key(path, "flower.key", Path(link.key))
        return link

    def command(self, node: Path, secret: Path) -> list[str]:
        """Return the command that starts the SuperNode."""
        trust = ["--insecure"] if self.insecure else (["--root-certificates", self.root_certificates] if self.root_certificates else [])
        own = ["--auth-supernode-private-key", self.key] if self.key else []
        local = ["--host", "127.0.0.1", "--port", str(self.port), "--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        return [program("flower-supernode"), "--superlink", self.superlink, *trust, *own, *local, "--node-config", f'fedlight="{node}"']


class Supervisor:
    """Keeps a SuperNode running: starts it, and starts it again when it ends."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.command = command
        self.output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._begins = 0  # what it says, in ``output``
        self._refused: float | None = None  # since when it exits at once
        self._next = 0.0

    def look(self) -> None:
        """Start the SuperNode if it does not run; raises ``ConfigurationError`` if it cannot reach or convince the SuperLink."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is None:
            if now - self._started > LASTED:
                self._refused = None
            return
        if now < self._next:
            return
        if self._process is not None:
            self._ended(now)
        with self.output.open("ab") as file:
            self._begins = file.tell()
            self._process = subprocess.Popen(self.command, stdout=file, stderr=subprocess.STDOUT)
        self._started, self._next = now, now + AGAIN

    def _ended(self, now: float) -> None:
        assert self._process is not None
        last = self.reason()
        if now - self._started > LASTED:
            self._refused = None
        self._refused = now if self._refused is None else self._refused
        hopeless = "CERTIFICATE_VERIFY_FAILED" in last
        if hopeless or now - self._refused > REFUSED:
            raise ConfigurationError(
                f"Expected the SuperNode to join the SuperLink but it ended with status {self._process.returncode}: {last}. "
                f"Check address, `root_certificates` and `key`, and that the key is registered; all of its output is in {self.output}"
            )
        log.warning("The SuperNode ended with status %d (%s): starting it again", self._process.returncode, last)

    def reason(self) -> str:
        """Return what the SuperNode said of why it ended."""
        said = self.output.read_text(errors="replace")
        _, found, why = said.rpartition("Exit Code")
        told = (found + why).partition("For more information")[0] if found else said[-300:]
        return " ".join(told.split())[:400].rstrip(".") or "it said nothing"

    def joined(self) -> bool:
        """Return whether the SuperNode that runs has been let in."""
        with self.output.open("rb") as file:
            file.seek(self._begins)
            return b"SuperNode ID" in file.read()

    def stop(self) -> None:
        """End the SuperNode."""
        end(self._process)


class Worker:
    """Asks the SuperNode, by a common secret, for messages and answers each in a process of its own, forked from this one."""

    def __init__(self, path: Path, link: Link, secret: bytes) -> None:
        self.path = path
        self.address = f"127.0.0.1:{link.port}"
        guard = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}))
        once = make_simple_http_retry_invoker()
        once.max_tries = 1  # the loop asks again
        self._client = RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,  # to this machine only
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), guard],
            retry_invoker=once,
        )
        self.node = client.node_of(str(path))
        try:
            samples = self.node.samples  # loaded before the first fork, once for all messages
        except (ConfigurationError, DataError, OSError) as error:
            raise ConfigurationError(f"Expected the samples that node.data in {path} describes but: {error}") from error
        build(Parts, {"network": {"class_path": "torch.nn.Identity"}}, "model")  # which imports all that settings can name
        self.node.preload()
        log.info("%s holds %d samples", self.node.config.name, len(samples[1]))
        self._children: set[int] = set()

    def look(self) -> None:
        """Fork for a message, if there is one, and collect the processes that have ended."""
        try:
            response = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        except httpx.HTTPError:
            return  # the SuperNode is not there yet, or not any more
        if response.HasField("task") and response.token:
            process = os.fork()
            if process == 0:
                self._answer(response.token)
            self._children.add(process)
        for process in list(self._children):
            if os.waitpid(process, os.WNOHANG)[0]:
                self._children.discard(process)
                self.node.preload()

    def _answer(self, token: str) -> NoReturn:
        """Answer one message, in the forked process."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is this process's parent that Ctrl-C ends
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # Nothing of the app is unpacked or loaded: this node runs no code but its own.
            vars(flower).update(install_from_fab=lambda *_, **__: None, get_load_client_app_fn=lambda **_: lambda *_: client.app)
            flower.run_clientapp(runtime_api_address=self.address, token=token, insecure=True)
            status = 0
        except SystemExit as done:
            status = int(done.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def stop(self) -> None:
        """End the processes that still answer."""
        for process in self._children:
            os.kill(process, signal.SIGTERM)


def run_node(path: Path) -> int:
    """Run a node until it is stopped, and return the exit status: 0 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigurationError: if `node.yaml` is wrong, or the SuperLink does not let the node in.
    """
    torch.set_num_threads(1)  # no threads in a process that forks
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name, level in (("fedlight.node", logging.INFO), ("fedlight.deploy", logging.INFO), ("flwr", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("flwr").propagate = False  # it prints for itself
    path = path.expanduser().absolute()
    with waiting(f"Reading {path}"):
        node, link = client.node_of(str(path)), Link.read(path)
    require_free(link.port, "set `flower.port` in node.yaml to another")
    node.config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, file = secrets.token_bytes(32), node.config.state / "worker.secret"
    file.unlink(missing_ok=True)
    write_private(file, secret)
    supervisor = Supervisor(link.command(path, file), node.config.state / "supernode.log")

    worker = None
    try:
        with stoppable():
            supervisor.look()
            with waiting(f"{node.config.name} reads its data"):
                worker = Worker(path, link, secret)
            with waiting(f"{node.config.name} waits for the SuperLink at {link.superlink}"):
                while not supervisor.joined():
                    supervisor.look()
                    time.sleep(POLL)
            log.info("%s has joined %s and waits for work", node.config.name, link.superlink)
            while True:
                supervisor.look()
                worker.look()
                time.sleep(POLL)
    except StopError as stopped:
        log.info("%s stops", node.config.name)
        return stopped.status
    finally:
        if worker is not None:
            worker.stop()
        supervisor.stop()
        file.unlink(missing_ok=True)
