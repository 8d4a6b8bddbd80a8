"""Identity keys that the tests of nodes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlight.deploy.keys import make_key
from tests.deploy.deployment import NODES


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of identity keys for every node."""
    folder = tmp_path_factory.mktemp("keys")
    for name in NODES:
        make_key(folder / name)
    return folder
