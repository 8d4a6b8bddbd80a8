"""`fedlight flower superlink`: a SuperLink, and beside it the SuperExec that starts the runs. Neither stays without the other.

A SuperLink alone takes runs and never starts one. Flower starts the SuperExec for itself and does not look whether it lives. Here both are
programs of this command, and the SuperExec proves itself with a secret that is made at each start: nobody else is handed a run.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedlight.core.errors import ConfigurationError
from fedlight.core.files import write_private
from fedlight.core.progress import waiting
from fedlight.flower import program
from fedlight.flower.processes import StopError, answers, end, end_session, require_free, stoppable

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where this machine reaches a program that listens on all its addresses."""


def run_superlink(arguments: Sequence[str]) -> int:
    """Run a SuperLink with these options until it is stopped, and return the exit status; one that ends by itself is an error."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--insecure", action="store_true")
    options.add_argument("--ssl-ca-certfile")
    given, _ = options.parse_known_args(arguments)
    require_free(given.port, "give another by --port")
    host = EVERYWHERE.get(given.host, given.host)
    trust = ["--insecure"] if given.insecure else ["--root-certificates", given.ssl_ca_certfile] if given.ssl_ca_certfile else []
    superlink = superexec = None
    with tempfile.TemporaryDirectory(prefix="fedlight-") as folder:
        secret = Path(folder) / "superexec.secret"
        write_private(secret, secrets.token_bytes(32))
        guard = ["--superexec-auth-secret-file", str(secret)]
        try:
            with stoppable():
                superlink = subprocess.Popen([program("flower-superlink"), *arguments, "--isolation", "process", *guard])
                with waiting(f"Starting the SuperLink on {given.host}:{given.port}"):
                    while not answers(given.port, host):
                        if superlink.poll() is not None:
                            return superlink.returncode  # it said why, or was asked for its options
                        time.sleep(0.2)
                address = f"[{host}]:{given.port}" if ":" in host else f"{host}:{given.port}"
                watched = ["--parent-pid", str(superlink.pid)]
                superexec = subprocess.Popen(
                    [program("flower-superexec"), "--runtime-api-address", address, *trust, *guard, *watched], start_new_session=True
                )
                print(f"The SuperLink is up at {address}: register nodes, start them, start a run", file=sys.stderr, flush=True)
                while superlink.poll() is None and superexec.poll() is None:
                    time.sleep(0.2)
                raise ConfigurationError(_ended(superlink, superexec))
        except StopError as stopped:
            return stopped.status
        finally:
            if superexec is not None:
                end_session(superexec)
            end(superlink)


def _ended(superlink: subprocess.Popen[bytes], superexec: subprocess.Popen[bytes]) -> str:
    name, other, process = ("SuperLink", "SuperExec", superlink) if superlink.poll() is not None else ("SuperExec", "SuperLink", superexec)
    return (
        f"Expected the {name} to run until it is stopped but it ended with status {process.returncode} (its words are above): the {other} "
        "is stopped as well. Start both with the same command; a run goes on with --run-config 'resume=true'"
    )
