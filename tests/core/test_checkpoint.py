"""A checkpoint is what was written, or refused."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlight.core.checkpoint import check_checkpoint, read_checkpoint, write_checkpoint
from fedlight.core.errors import ConfigurationError

CONTENT = {"fedlight": {"round": 3}, "state_dict": {"w": torch.arange(50.0), "b": torch.zeros(3)}, "loops": {"done": [1, 2]}}


class MakesFolder:
    """What an attacker would write: loading it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "last.ckpt", CONTENT)
    return tmp_path / "last.ckpt"


def test_what_is_read_is_what_was_written(path: Path) -> None:
    for found in (read_checkpoint(path), torch.load(path, weights_only=True)):  # as plain Lightning does
        assert found["fedlight"] == CONTENT["fedlight"] and found["loops"] == CONTENT["loops"]
        assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in CONTENT["state_dict"].items())
    assert check_checkpoint(path) and list(path.parent.iterdir()) == [path]


def test_every_flipped_bit_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(raw)), 300):
        data = bytearray(raw)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(ConfigurationError, match="last.ckpt but it is damaged or none"):
            read_checkpoint(path)


def test_a_lost_end_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    for length in (0, 10, len(raw) // 2, len(raw) - 71, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ConfigurationError, match="damaged or none"):
            read_checkpoint(path)


def test_a_federated_checkpoint_without_its_digest_is_refused_and_a_plain_one_is_read(path: Path) -> None:
    torch.save(CONTENT, path)
    with pytest.raises(ConfigurationError, match="damaged or none"):
        read_checkpoint(path)
    torch.save({"state_dict": CONTENT["state_dict"]}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], CONTENT["state_dict"]["w"])


def test_a_file_that_grows_when_it_is_read_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    with pytest.raises(ConfigurationError, match="damaged or none"):
        check_checkpoint(path)


def test_objects_are_refused_unless_they_are_asked_for(path: Path) -> None:
    write_checkpoint(path, {**CONTENT, "extra": MakesFolder(path.parent / "made")})
    with pytest.raises(ConfigurationError, match="other objects, whose loading could run code"):
        read_checkpoint(path)
    assert not (path.parent / "made").exists()
    read_checkpoint(path, objects=True)
    assert (path.parent / "made").exists()
