from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.federation import CODEC, invoke, run_folders


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    """The command line seeds and filters globally; give the generator and the filters back."""
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        yield
    torch.set_rng_state(state)
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").filters.clear()


Fedlight = Callable[..., None]


@pytest.fixture
def fedlight() -> Fedlight:
    """Return (command, folder, *options) -> None."""
    return invoke


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a learned codec: 6 rounds, validated every 2, compared every 3."""
    folder = tmp_path_factory.mktemp("finished")
    every = ["--trainer.val_check_interval", "2", "--model.sim_every", "3", "--data.client_holdout", "0.2"]
    with warnings.catch_warnings():
        invoke("fit", folder, "--trainer.max_steps", "6", "--model.codec", CODEC, "--experiment", "done", *every)
    return run_folders(folder)[0]
