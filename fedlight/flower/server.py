"""The ServerApp of a federated run: `fedlight fit` with a YAML of the app's folder, whose clients are Flower's nodes."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlight.cli import open_cli
from fedlight.console.errors import mendable
from fedlight.core.errors import ConfigurationError, require
from fedlight.federated_cli import FederatedCLI
from fedlight.flower.clients import FlowerClients

app = ServerApp()

_GRID: ContextVar[Grid] = ContextVar("grid")


class DeployedCLI(FederatedCLI):
    """The command line of a run whose clients are nodes: it connects them, and tells them their part of the configuration."""

    def before_fit(self) -> None:
        """Connect the clients."""
        clients = self.model.clients
        if not isinstance(clients, FlowerClients):
            raise ConfigurationError(
                f"Expected `model.clients` to be FlowerClients in a run on Flower but got {type(clients).__name__}: set it and its `nodes`"
            )
        config = self.config[self.config.subcommand].as_dict()
        clients.configure(config["model"], config["data"].get("augmentation"))
        clients.connect(_GRID.get())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; the configuration of the run names the YAML."""
    logging.getLogger("fedlight").setLevel(logging.INFO)
    _GRID.set(grid)
    sys.argv[1:] = []  # Flower's own, which Lightning's command line would warn of
    try:
        # Flower puts the app's folder on the import path.
        open_cli(DeployedCLI, arguments(context.run_config, [Path(entry) for entry in sys.path if entry]))
    except Exception as error:
        sentence = mendable(error)
        if sentence is None:
            raise
        # Flower prints what is raised, and sends it to `flwr run --stream`; an exit of the process would lose it.
        raise ConfigurationError(sentence) from None


def arguments(config: Mapping[str, Any], folders: list[Path]) -> list[str]:
    """Return the command line of a run's configuration.

    ``config`` names the YAML in the app's folder; ``out`` is the folder of the results; ``resume`` goes on from the last checkpoint there;
    ``options`` are further options of `fedlight fit`.
    """
    name = str(config["config"])
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise ConfigurationError(
            f"Expected `config` to be a file of the app's folder but there is no {name}: correct the run's configuration"
        )
    out = Path(str(config.get("out") or "logs")).expanduser().absolute()
    given = ["fit", "--config", str(path), "--trainer.default_root_dir", str(out), *shlex.split(str(config.get("options") or ""))]
    return [*given, "--ckpt_path", str(last_checkpoint(out))] if config.get("resume") else given


def last_checkpoint(out: Path) -> Path:
    """Return the newest `last.ckpt` below a folder; raises ``ConfigurationError`` if there is none."""
    found = sorted(out.glob("**/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    require(found, f"Expected a checkpoint to resume from but there is no last.ckpt below {out}: set `resume` to false")
    return found[-1]
