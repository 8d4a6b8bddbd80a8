"""What clients keep is the same in memory and in files."""

from __future__ import annotations

import io

import pytest
import torch

from fedlight.clients.shelf import Shelf
from fedlight.clients.store import ClientStore
from fedlight.core.errors import ConfigurationError

KIB = 1 / 1024  # MiB


def state(value: float) -> dict:
    """A state of 400 bytes."""
    return {"algorithm": {"control": torch.full((50,), float(value))}, "codec": {"residual": torch.full((50,), -float(value))}}


def same(kept: dict, value: float) -> bool:
    expected = state(value)
    return all(torch.equal(kept[part][name], tensor) for part, tensors in expected.items() for name, tensor in tensors.items())


@pytest.mark.parametrize("limit", [0.0, KIB, 1.0], ids=["files", "both", "memory"])
def test_a_store_gives_back_what_it_was_given_wherever_it_lies(limit):
    store = ClientStore(limit)
    store.commit({client: state(client) for client in range(8)})
    store.commit({client: state(10 + client) for client in (0, 5)})
    assert all(same(store.peek(client), 10 + client if client in (0, 5) else client) for client in range(8))
    assert store.peek(8) == {} and sorted(store.state_dict()["kept"]) == list(range(8))


def test_no_more_than_its_size_is_in_memory_and_the_latest_are():
    shelf = Shelf(KIB)
    for client in (*range(8), 3):
        shelf[client] = state(client)
        assert shelf.memory_bytes <= 1024
    assert shelf.memory_bytes == 800 and len(shelf) == 8
    folder = shelf._folder
    assert {path.name for path in folder.iterdir()} == {f"{client}.pt" for client in (0, 1, 2, 4, 5, 6)}
    del shelf[0]
    assert 0 not in shelf and len(shelf) == 7 and not (folder / "0.pt").exists()
    with pytest.raises(KeyError):
        del shelf[0]


def test_what_was_read_stays_when_the_client_keeps_something_new():
    store = ClientStore(0.0)
    store.commit({1: state(1.0)})
    before = store.peek(1)
    store.commit({1: state(2.0)})
    assert same(before, 1.0) and same(store.peek(1), 2.0)


def test_a_draft_changes_nothing_in_a_file_until_it_is_committed():
    store = ClientStore(0.0)
    store.commit({1: state(1.0)})
    store.draft(1)["algorithm"]["control"].add_(1)
    assert same(store.peek(1), 1.0)
    store.commit(store.take_draft({1}))
    assert store.peek(1)["algorithm"]["control"][0] == 2.0


def test_what_clients_changed_in_an_attempt_that_did_not_count_is_forgotten():
    store = ClientStore()
    store.commit({1: state(1.0)})
    for client in (1, 2):
        store.draft(client).update(state(2.0))
    assert set(store.take_draft({2})) == {2}, "the draft of the one that counted alone"
    assert same(store.draft(1), 1.0), "and the other begins from what it kept"


@pytest.mark.parametrize(("settled", "value"), [((0, 0), 2.0), ((0, 1), 1.0), (None, 1.0)])
def test_a_client_reads_in_its_next_request_whether_its_last_attempt_counted(settled, value):
    """Over a network nobody tells it before."""
    store = ClientStore()
    store.commit({1: state(1.0)})
    store.begin(1, (0, 0), None)
    store.draft(1).update(state(2.0))
    store.begin(1, (0, 0), None)
    assert same(store.draft(1), 2.0) and same(store.peek(1), 1.0), "a further stage of the same attempt changes nothing"
    store.begin(1, (3, 1), settled)
    assert same(store.peek(1), value) and same(store.draft(1), value)


def test_a_reader_who_knows_that_an_attempt_counted_sees_what_the_client_does_not_know_yet():
    store = ClientStore()
    store.begin(3, (1, 0), None)
    store.draft(3)["norm"] = {"w": torch.ones(2)}
    assert store.peek(3) == store.peek(3, (0, 0)) == {}
    assert torch.equal(store.peek(3, (1, 0))["norm"]["w"], torch.ones(2))


def test_a_draft_of_which_nobody_knows_yet_goes_through_a_checkpoint():
    saved, restored = ClientStore(), ClientStore()
    saved.begin(1, (4, 1), None)
    saved.draft(1).update(state(2.0))
    checkpoint = io.BytesIO()
    torch.save(saved.state_dict(), checkpoint)
    checkpoint.seek(0)
    restored.load_state_dict(torch.load(checkpoint, weights_only=True))
    restored.begin(1, (5, 0), (4, 1))
    assert same(restored.peek(1), 2.0)


@pytest.mark.parametrize("limits", [(0.0, 1.0), (1.0, 0.0)], ids=["from files", "to files"])
def test_it_goes_through_a_checkpoint_whatever_the_sizes(limits):
    saved, restored = map(ClientStore, limits)
    saved.commit({client: state(client) for client in range(4)})
    checkpoint = io.BytesIO()
    torch.save(saved.state_dict(), checkpoint)
    checkpoint.seek(0)
    restored.commit({9: state(9.0)})
    restored.load_state_dict(torch.load(checkpoint, weights_only=True))
    assert sorted(restored.state_dict()["kept"]) == list(range(4)) and all(same(restored.peek(client), client) for client in range(4))


@pytest.mark.parametrize("limit", [0.0, 1.0], ids=["files", "memory"])
def test_a_part_can_be_forgotten(limit):
    store = ClientStore(limit)
    store.commit({client: state(client) for client in range(3)})
    store.forget("codec")
    assert all(set(store.peek(client)) == {"algorithm"} for client in range(3))


def test_files_go_with_the_store():
    store = ClientStore(0.0)
    store.commit({1: state(1.0)})
    folder = store._states._folder
    assert folder.is_dir()
    store.load_state_dict({"kept": {}, "drafts": {}})
    assert not folder.exists()


def test_a_negative_size_is_refused():
    with pytest.raises(ConfigurationError, match="`client_memory_mb` >= 0 but got -1"):
        ClientStore(-1)
