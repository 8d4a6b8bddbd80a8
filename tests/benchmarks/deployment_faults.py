"""Faults of a deployment on this machine, one after another, and what each costs.

python tests/benchmarks/deployment_faults.py [NAME ...]
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedlight.deploy.keys import make_key
from fedlight.flower.demo import Lab
from fedlight.flower.files import make_authority
from tests.flower.deployed import VARIANTS, configure, simulated, weights

NAMES = ["north", "south", "west"]
TIMEOUT = 25.0
ROUNDS = 6

GARBAGE = """
import sys
from fedlight.deploy import Node
Node.answer = lambda self, letter: bytes(range(100))
from fedlight.flower.commands import main
sys.exit(main(["node", sys.argv[1]]))
"""


class Watched(Lab):
    """A lab whose run goes on in a thread, so that things can happen to it."""

    def begin(self, rounds: int = ROUNDS, resume: bool = False) -> None:
        self.lines: list[str] = []
        self.status: int | None = None
        read, write = os.pipe()
        kept, self._out = os.fdopen(read), os.fdopen(write, "w")

        def collect() -> None:
            self.lines += kept

        def go() -> None:
            command = [sys.executable, "-c", RUN, str(self.root), str(rounds), str(resume)]
            self.status = subprocess.run(command, env=self.environment, stdout=self._out, stderr=subprocess.STDOUT, check=False).returncode
            self._out.close()

        self.start_time = time.monotonic()
        self._thread = threading.Thread(target=go)
        threading.Thread(target=collect, daemon=True).start()
        self._thread.start()

    def after(self, text: str, seconds: float = 150) -> None:
        """Wait until the run has said something."""
        end = time.monotonic() + seconds
        while not any(re.search(text, line) for line in self.lines):
            if time.monotonic() > end or not self._thread.is_alive():
                raise RuntimeError(f"never: {text}\n" + "".join(self.lines[-20:]))
            time.sleep(0.1)

    def finish(self) -> str:
        self._thread.join()
        took = time.monotonic() - self.start_time
        words = [line.strip() for line in self.lines if re.search("dropped|no reply|no answer|too late|error|Waiting", line)]
        ended = self.runs()[-1]["status"]
        return f"{ended} after {took:.0f} s; " + (" | ".join(dict.fromkeys(word[-160:] for word in words[:6])) or "nothing said")


RUN = """
import sys
from pathlib import Path
from fedlight.flower import program
import subprocess
root, rounds, resume = sys.argv[1:]
options = f'options="--trainer.max_steps {rounds}"'
command = [program("flwr"), "run", f"{root}/app", "lab", "--stream", "--run-config", f"{options} resume={resume.lower()}"]
sys.exit(subprocess.run(command).returncode)
"""


def lab(root: Path, changes: dict[str, Any] | None = None) -> Watched:
    made = Watched(root / "lab", NAMES)
    configure(made, changes or {})
    path = made.root / "app" / "run.yaml"
    path.write_text(path.read_text().replace("timeout: 120.0", f"timeout: {TIMEOUT}"))
    made.start()
    return made


def killed_in_a_round(root: Path) -> str:
    made = lab(root)
    try:
        made.begin(12)
        made.after("Round 2/")
        made.kill("west")
        made.after("Round 4/")
        made.start_node("west")
        made.after("Round 11/", 200)
        return made.finish() + f"; west afterwards: {made.said('west', 2)}"
    finally:
        made.stop()


def killed_between_secure_stages(root: Path) -> str:
    made = lab(root, VARIANTS["secure aggregation"])
    try:
        made.begin(4)
        made.after("Round 1/", 250)
        log = made.root / "west.log"
        seen = log.read_text().count("share_keys")
        end = time.monotonic() + 60
        while log.read_text().count("share_keys") == seen and time.monotonic() < end:
            time.sleep(0.05)
        made.kill("west")
        made.start_node("west")
        return made.finish()
    finally:
        made.stop()


def straggler(root: Path) -> str:
    made = lab(root)
    try:
        made.begin(8)
        made.after("Round 2/")
        group = made._running["west"].pid
        os.killpg(group, signal.SIGSTOP)
        time.sleep(TIMEOUT + 5)
        os.killpg(group, signal.SIGCONT)
        return made.finish()
    finally:
        made.stop()


def garbage(root: Path) -> str:
    made = lab(root)
    try:
        made.end("west")
        time.sleep(1)
        made.launch("west", [sys.executable, "-c", GARBAGE, str(made.root / "west.yaml")])
        made.begin(4)
        return made.finish()
    finally:
        made.stop()


def wrong_authority(root: Path) -> str:
    made = lab(root)
    try:
        other = root / "other"
        other.mkdir()
        make_authority(other)
        text = (made.root / "west.yaml").read_text().replace("ca.crt", str(other / "ca.crt")).replace("state/west", "state/other")
        return _alone(made, text)
    finally:
        made.stop()


def unknown_key(root: Path) -> str:
    made = lab(root)
    try:
        make_key(made.root / "keys" / "stranger.node", "flower.key")
        text = (made.root / "west.yaml").read_text().replace("keys/west.node", "keys/stranger.node").replace("state/west", "state/other")
        return _alone(made, text)
    finally:
        made.stop()


def _alone(made: Watched, text: str) -> str:
    """Run a node with another node.yaml, in place of west, and return what it says."""
    made.end("west")
    path = made.root / "odd.yaml"
    path.write_text(text)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fedlight", "node", str(path)],
        env=made.environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return f"exit {done.returncode} after {time.monotonic() - start:.0f} s; {done.stderr.strip().splitlines()[-1][:400]}"


def _resumed(made: Watched, root: Path, first: str) -> str:
    saved = torch.load(max(made.root.glob("logs/**/last.ckpt")), weights_only=True)["global_step"]
    made.begin(ROUNDS, resume=True)
    second = made.finish()
    simulation = simulated(made, root / "simulated", "--trainer.max_steps", str(ROUNDS))
    equal = weights(made.root / "logs") == weights(simulation)
    return f"{first}; resumed after {saved} rounds: {second}; weights equal to an uninterrupted simulation: {equal}"


def server_killed(root: Path) -> str:
    made = lab(root, VARIANTS["SCAFFOLD"])
    try:
        made.begin(ROUNDS)
        made.after("Round 3/")
        subprocess.run(["pkill", "-9", "-f", f"flwr-serverapp.*{made.address}"], check=False)
        return _resumed(made, root, made.finish())
    finally:
        made.stop()


def superlink_killed(root: Path) -> str:
    made = lab(root)
    try:
        made.begin(ROUNDS)
        made.after("Round 3/")
        made.kill("superlink")
        time.sleep(1)
        made.start_superlink()
        first = made.finish()
        made.wait(lambda: made.online() >= len(NAMES), "the nodes to come back")
        return _resumed(made, root, first)
    finally:
        made.stop()


def full_disk(root: Path) -> str:
    made = lab(root)
    try:
        made.end("west")
        limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); from fedlight.flower.commands import main; "
        made.launch("west", [sys.executable, "-c", f"{limit}sys.exit(main(['node', {str(made.root / 'west.yaml')!r}]))"])
        made.begin(4)
        return made.finish() + f"; west: {made.said('west', 2)}"
    finally:
        made.stop()


FAULTS: dict[str, Callable[[Path], str]] = {
    "node killed in a round, started again": killed_in_a_round,
    "node killed between the stages of secure aggregation": killed_between_secure_stages,
    "straggler beyond the timeout": straggler,
    "garbage": garbage,
    "wrong certificate authority": wrong_authority,
    "unknown key": unknown_key,
    "ServerApp killed -9, resumed": server_killed,
    "SuperLink killed -9, started again, resumed": superlink_killed,
    "full disk at a client": full_disk,
}


def main() -> None:
    chosen = [name for name in FAULTS if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = FAULTS[name](Path(folder))
            except Exception as error:
                outcome = f"FAILED: {type(error).__name__}: {error}"
        print(json.dumps({name: outcome}, indent=1), flush=True)


if __name__ == "__main__":
    main()
