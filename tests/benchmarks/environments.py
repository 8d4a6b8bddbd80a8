"""The peers' environments, one each because their pins conflict: made on first use under `.bench-env`, with this one's torch.

A `.pth` file puts the running environment's packages behind the peer's own, so that pip adds only what is missing or pinned otherwise.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".bench-env"

REQUIREMENTS = {"pfl": "pfl[pytorch]==0.6.0", "flower": "flwr[simulation]==1.42.0", "fedlab": "fedlab==1.3.0"}

IMPORTS = {
    "pfl": "import pfl.model.pytorch, pfl.aggregate.simulate",
    "flower": "import flwr.simulation, ray",
    "fedlab": "import fedlab.core.standalone, fedlab.contrib.algorithm.fedavg",
}


class Unavailable(Exception):
    """A peer that cannot be installed, imported or run, and why."""


def peer_python(peer: str) -> Path:
    """Return the interpreter of a peer's environment, which is made if it does not exist or another version is asked for.

    Raises:
        Unavailable: if pip cannot install the peer, or it cannot be imported.
    """
    folder, requirement = ROOT / peer, f"{REQUIREMENTS[peer]}, {sys.version}, {sys.prefix}"
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    if not marker.exists() or marker.read_text() != requirement:
        venv.create(folder, clear=True, symlinks=True)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        (site / "running_environment.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
        _call([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", REQUIREMENTS[peer]], "pip")
        _call([str(python), "-c", IMPORTS[peer]], "its import")
        marker.write_text(requirement)
    return python


def _call(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unavailable(f"{what} failed: {last_error(done.stdout)}")


def last_error(output: str) -> str:
    """Return the line of a program's output that says best why it failed: the last that names an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1][:300]
