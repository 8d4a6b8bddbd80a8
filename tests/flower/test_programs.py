"""`fedlight flower superlink` and `fedlight flower run`, with small programs in the place of Flower's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from fedlight.core.errors import ConfigurationError
from fedlight.flower.demo import free_ports
from fedlight.flower.run import connection, run_app
from tests.federation import environment

SUPERLINK = """
import os, socket, sys, time
open("superlink.pid", "w").write(str(os.getpid()))
made = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
time.sleep(100)
"""

SUPEREXEC = """
import os, subprocess, sys, time
app = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open("secret", "wb").write(open(sys.argv[sys.argv.index("--superexec-auth-secret-file") + 1], "rb").read())
open("app.pid", "w").write(str(app.pid))
os.rename("app.pid", "app")
open("superexec.pid", "w").write(str(os.getpid()))
os.rename("superexec.pid", "superexec")
time.sleep(100)
"""

COMMAND = """
import sys
from fedlight.flower import superlink
from fedlight.flower.commands import main
superlink.program = lambda name: f"{folder}/{name}"
sys.exit(main(["flower", "superlink", *sys.argv[1:]]))
"""


def script(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def gone(pid: int) -> bool:
    """Return whether a process has ended, within ten seconds; a zombie that nobody collects has."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("victim", "number", "status"),
    [("superexec", signal.SIGKILL, 2), ("superlink.pid", signal.SIGKILL, 2), ("", signal.SIGTERM, 143), ("", signal.SIGINT, 0)],
)
def test_nothing_of_a_superlink_stays_when_a_part_of_it_ends(tmp_path: Path, victim: str, number: int, status: int) -> None:
    script(tmp_path / "flower-superlink", SUPERLINK)
    script(tmp_path / "flower-superexec", SUPEREXEC)
    port = str(free_ports(1)[0])
    code = COMMAND.replace("{folder}", str(tmp_path))
    command = [sys.executable, "-c", code, "--port", port, "--insecure"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "superexec").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        pids = {name: int((tmp_path / name).read_text()) for name in ("superlink.pid", "superexec", "app")}
        assert len((tmp_path / "secret").read_bytes()) == 32
        os.kill(pids.get(victim, process.pid), number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    assert all(gone(pid) for pid in pids.values())
    if victim:
        name = "SuperExec" if victim == "superexec" else "SuperLink"
        assert f"fedlight: error: Expected the {name} to run until it is stopped but it ended with status -9" in said


def test_a_superlink_that_ends_at_once_has_its_own_status(tmp_path: Path) -> None:
    script(tmp_path / "flower-superlink", "import sys; print('its options'); sys.exit(7)")
    code = COMMAND.replace("{folder}", str(tmp_path))
    command = [sys.executable, "-c", code, "--port", str(free_ports(1)[0]), "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 7 and "its options" in done.stdout


def test_a_port_of_the_superlink_that_is_taken_is_told(tmp_path: Path) -> None:
    from fedlight.flower.superlink import run_superlink

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigurationError, match="in use.*give another by --port"):
        run_superlink(["--port", str(taken.getsockname()[1])])


FLWR = """
import json, sys
if sys.argv[1] == "run":
    print("Successfully started run 12", flush=True)
    sys.exit({status})
assert sys.argv[1:] == ["list", "lab", "--run-id", "12", "--format", "json"], sys.argv
print(json.dumps({runs}))
"""


def flwr(folder: Path, ended: str, status: int = 0) -> None:
    runs = {"runs": [{"run-id": "12", "status": ended, "status-details": "no such option"}]}
    script(folder / "flwr", FLWR.replace("{status}", str(status)).replace("{runs}", f"json.loads({json.dumps(json.dumps(runs))})"))


RUN = ["app", "lab", "--stream", "--run-config", "resume=true"]


def test_a_run_that_ends_in_an_error_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedlight.flower.run.program", lambda name: str(tmp_path / name))
    flwr(tmp_path, "finished:completed")
    assert run_app(RUN) == 0
    assert "Successfully started run 12" in capfd.readouterr().out
    for ended in ("finished:failed", "finished:stopped"):
        flwr(tmp_path, ended)
        with pytest.raises(ConfigurationError, match=rf"run 12 to complete but it is {ended} \(no such option\).*resume=true"):
            run_app(RUN)
    flwr(tmp_path, "finished:completed", status=5)
    assert run_app(RUN) == 5


@pytest.mark.parametrize(
    ("given", "link"),
    [
        (RUN, ["lab"]),
        (["--stream", "app"], []),
        (["--run-config", "a=1 b=2", "app", "--federation", "@a/b", "other", "--stream", "--unknown"], ["other"]),
    ],
)
def test_the_connection_is_found_among_the_options(given: list[str], link: list[str]) -> None:
    assert connection(given) == link
