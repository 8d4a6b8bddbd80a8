"""Digests: equal for what is equal, different for everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlight.core.codec import Public
from fedlight.core.digest import digest_public
from fedlight.core.errors import ConfigurationError

PUBLIC = Public(1, 2, 3, 0, announced={"0": {"gain": 1.0}, "clip": 0.5})


def test_what_everybody_was_told_has_one_digest_in_any_order():
    assert digest_public(PUBLIC) == digest_public(replace(PUBLIC, announced={"clip": 0.5, "0": {"gain": 1.0}}))
    assert len(digest_public(PUBLIC)) == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"round": 3},
        {"attempt": 4},
        {"step": 1},
        {"announced": {}},
        {"announced": {"0": {"gain": 1e30}, "clip": 0.5}},
        {"announced": {"0": {"gain": 1.0, "clip": 0.5}}},
        {"announced": {"0": {"gain": 1.0}, "clip": 0.5000000000000001}},
        {"announced": {"0": {"gain": 1.0}, "clip": "0.5"}},
        {"announced": {"0": {"gain": 1.0}, "clip": [0.5]}},
        {"announced": {"0": {"gain": 1.0}, "clip": torch.tensor(0.5)}},
        {"announced": {"0": {"gain": 1.0}, "clip": torch.tensor(-0.5)}},
        {"announced": {"0": {"gain": 1.0}, "clip": None}},
    ],
)
def test_any_difference_in_what_clients_are_told_shows(changes):
    assert digest_public(replace(PUBLIC, **changes)) != digest_public(PUBLIC)


def test_neighbours_are_told_apart():
    """Entries that look alike once they are put one behind the other."""
    announced = [{"a": 12, "b": 3}, {"a": 1, "b": 23}, {"ab": "c"}, {"a": "bc"}, {"a": [1, [2]]}, {"a": [[1], 2]}, {"a": [1, 2]}]
    assert len({digest_public(Public(announced=told)) for told in announced}) == len(announced)


def test_what_has_no_bytes_of_its_own_is_refused():
    with pytest.raises(ConfigurationError, match="but got object: announce those"):
        digest_public(Public(announced={"gain": object()}))
