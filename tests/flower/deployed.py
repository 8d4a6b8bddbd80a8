"""Runs over Flower on this machine, and the same run simulated."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from fedlight.flower.demo import Lab


def merged(base: Any, changes: Mapping[str, Any]) -> Any:
    """Return a configuration with changes; a section that names a class, or None, is replaced as a whole."""
    if not isinstance(base, dict):
        return changes
    whole = "class_path" in changes
    return (
        {}
        | ({} if whole else base)
        | {name: merged(base.get(name), value) if isinstance(value, dict) and not whole else value for name, value in changes.items()}
    )


def configure(lab: Lab, changes: Mapping[str, Any]) -> None:
    """Change the run of a lab, whose clients draw what a simulation's do."""
    path = lab.root / "app" / "run.yaml"
    run = merged(yaml.safe_load(path.read_text()), changes)
    run["model"]["clients"]["init_args"]["reproducible"] = True
    path.write_text(yaml.safe_dump(run, sort_keys=False))


def give_data(lab: Lab, data: Mapping[str, Any]) -> None:
    """Give server and nodes another data set: the section `data` of a run, of which every node has its share."""
    path = lab.root / "app" / "run.yaml"
    run = yaml.safe_load(path.read_text())
    run["data"] = {"sampler": "Everyone", **data}
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    for name in lab.names:
        file = lab.root / f"{name}.yaml"
        node = yaml.safe_load(file.read_text())
        node["node"]["data"]["init_args"]["data"]["init_args"] = dict(data)
        file.write_text(yaml.safe_dump(node, sort_keys=False))


def simulated(lab: Lab, out: Path, *options: str) -> Path:
    """Run the lab's configuration without a network and return its folder."""
    config = str(lab.root / "app" / "run.yaml")
    command = [sys.executable, "-m", "fedlight", "fit", "--config", config, "--model.clients", "null", "--model.engine", "Sequential"]
    done = subprocess.run(
        [*command, "--trainer.default_root_dir", str(out), *options],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def weights(folder: Path) -> str:
    """Return the sha256 of the weights in the newest `last.ckpt` below a folder."""
    path = max(folder.glob("**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(path, weights_only=True)["state_dict"]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


VARIANTS: dict[str, dict[str, Any]] = {
    "TransformCodec, CatchUp": {},
    "secure aggregation": {
        "model": {"aggregator": {"class_path": "SecureAggregator", "init_args": {"cohort": 3, "threshold": 2}}, "downlink": "FullModel"}
    },
    "SCAFFOLD": {
        "model": {
            "algorithm": {"class_path": "Scaffold", "init_args": {"lr": 0.1, "batch_size": 16, "steps": 10}},
            "codec": None,
            "downlink": "FullModel",
        }
    },
    "PowerSGD, two passes": {"model": {"codec": {"class_path": "PowerSGDCodec", "init_args": {"rank": 2}}, "downlink": "FullModel"}},
}
"""What is changed of the run that `fedlight flower init --lab` writes."""
