import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlight.core.errors import ConfigurationError, DataError
from fedlight.data import IID, Dirichlet, Explicit, Natural, Partition, Partitioner, QuantitySkew, Shards, check_partition
from fedlight.data.splits import client_by_client, cut, fill_small, split_holdout, stratified_choice

# One row per partitioner that draws the clients; a new one is added here and gets the whole contract.
DRAWN = [
    pytest.param(IID, id="iid"),
    pytest.param(lambda min_samples=1: Dirichlet(0.1, min_samples), id="dirichlet-skewed"),
    pytest.param(lambda min_samples=1: Dirichlet(100.0, min_samples), id="dirichlet-even"),
    pytest.param(lambda min_samples=1: Shards(2, min_samples), id="shards"),
    pytest.param(lambda min_samples=1: QuantitySkew(0.2, min_samples), id="quantity"),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(samples: int, classes: int = 10) -> np.ndarray:
    return rng(99).integers(0, classes, samples)


def same(a: Partition, b: Partition) -> bool:
    return np.array_equal(a.order, b.order) and np.array_equal(a.offsets, b.offsets)


@pytest.mark.parametrize("make", DRAWN)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32))
def test_every_sample_in_exactly_one_client_or_refused(make, samples, clients, classes, min_samples, seed):
    partitioner: Partitioner = make(min_samples)
    labels = labels_of(samples, classes)
    try:
        partition = partitioner.partition(labels, clients, rng(seed))
    except ConfigurationError:
        # Only what cannot be served is refused; Shards also refuses what would mix labels.
        assert clients * min_samples > samples or isinstance(partitioner, Shards)
        return
    check_partition(partition, samples)
    assert len(partition) == clients
    assert partition.sizes.min() >= min_samples
    assert partition.order.dtype == np.int64


@pytest.mark.parametrize("make", DRAWN)
def test_same_seed_same_partition_other_seed_another(make):
    labels = labels_of(500)
    first = make().partition(labels, 10, rng(1))
    assert same(first, make().partition(labels, 10, rng(1)))
    assert not same(first, make().partition(labels, 10, rng(2)))


@pytest.mark.parametrize("make", DRAWN)
def test_impossible_populations_are_refused(make):
    with pytest.raises(ConfigurationError, match=r"more clients than samples.*set num_clients to 10 or less"):
        make().partition(labels_of(10), 11, rng())
    with pytest.raises(ConfigurationError, match="expected at least 1, got 0"):
        make().partition(labels_of(10), 0, rng())
    with pytest.raises(ConfigurationError, match="needs a number, got None"):
        make().partition(labels_of(10), None, rng())
    with pytest.raises(ConfigurationError, match="min_samples: expected at least 1"):
        make(0)


@pytest.mark.quick(2)
@pytest.mark.parametrize("make", DRAWN)
def test_hundred_thousand_clients(make):
    labels = labels_of(300_000)
    partition = make().partition(labels, 100_000, rng())
    check_partition(partition, len(labels))
    assert partition.sizes.min() >= 1


@pytest.mark.parametrize("kind", [Dirichlet, QuantitySkew])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(kind, alpha):
    with pytest.raises(ConfigurationError, match="alpha: expected a finite number above 0"):
        kind(alpha)


def label_skew(partition: Partition, labels: np.ndarray) -> float:
    """Mean share of the most frequent label of a client."""
    return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in partition]))


def test_dirichlet_skew_rises_as_alpha_falls():
    labels = labels_of(4000)
    skews = [label_skew(Dirichlet(alpha).partition(labels, 20, rng()), labels) for alpha in (1000.0, 1.0, 0.1, 0.01)]
    assert skews == sorted(skews)
    assert skews[0] < 0.2
    assert skews[-1] > 0.8


def test_dirichlet_of_vanishing_alpha_is_finite_and_complete():
    check_partition(Dirichlet(1e-12).partition(labels_of(200), 10, rng()), 200)


def test_iid_clients_are_of_equal_size():
    assert set(IID().partition(labels_of(103), 10, rng()).sizes) == {10, 11}


def test_quantity_skew_mixes_labels_and_skews_sizes():
    labels = labels_of(10_000)
    partition = QuantitySkew(0.3).partition(labels, 10, rng())
    assert partition.sizes.max() > 5 * partition.sizes.min()
    assert np.bincount(labels[partition[int(partition.sizes.argmax())]]).min() > 0


def test_shards_limit_the_labels_of_a_client():
    labels = rng().permutation(np.repeat(np.arange(10), 100))
    aligned = Shards(2).partition(labels, 50, rng())  # 100 shards of 10: none spans two labels
    assert max(len(np.unique(labels[p])) for p in aligned) == 2
    unaligned = Shards(2).partition(labels, 13, rng())
    assert max(len(np.unique(labels[p])) for p in unaligned) <= 4


def test_shards_too_short_for_min_samples_are_refused():
    with pytest.raises(ConfigurationError, match="shards"):
        Shards(4, min_samples=2).partition(labels_of(30), 10, rng())


def test_natural_takes_the_ids_that_are_there():
    ids = np.array(["b", "a", "c", "a", "b", "a"])
    partition = Natural().partition(np.zeros(6, int), None, rng(), ids)
    assert [p.tolist() for p in partition] == [[1, 3, 5], [0, 4], [2]]
    assert same(partition, Natural().partition(np.zeros(6, int), 0, rng(1), ids))
    assert same(partition, Natural().partition(np.zeros(6, int), 3, rng(2), ids))
    with pytest.raises(ConfigurationError, match="3 clients of its own, got 4"):
        Natural().partition(np.zeros(6, int), 4, rng(), ids)
    with pytest.raises(ConfigurationError, match="needs client ids"):
        Natural().partition(np.zeros(6, int), None, rng())


def test_natural_refuses_or_drops_small_clients():
    ids = np.array([7, 5, 9, 5, 7, 5])
    with pytest.raises(ConfigurationError, match=r"1 smaller clients \(client 2 has 1\)"):
        Natural(min_samples=2).partition(np.zeros(6, int), None, rng(), ids)
    dropped = Natural(min_samples=2, drop_small=True).partition(np.zeros(6, int), None, rng(), ids)
    assert [p.tolist() for p in dropped] == [[1, 3, 5], [0, 4]]
    check_partition(dropped, 6, complete=False)
    with pytest.raises(DataError, match="sample 2 in none"):
        check_partition(dropped, 6)
    with pytest.raises(ConfigurationError, match="drop_small leaves none"):
        Natural(min_samples=9, drop_small=True).partition(np.zeros(6, int), None, rng(), ids)


LISTS = [[0, 3], [5, 1, 2]]


def explicit_file(kind: str, folder) -> str:
    path = folder / f"clients.{kind.rstrip('_csr')}"
    if kind == "json":
        path.write_text(json.dumps({"first": LISTS[0], "second": LISTS[1]}))
    elif kind == "npz":
        np.savez(path, **{f"c{i}": np.array(part) for i, part in enumerate(LISTS)})
    else:
        np.savez(path, order=np.concatenate(LISTS), offsets=np.array([0, 2, 5]))
    return str(path)


@pytest.mark.parametrize("kind", ["list", "json", "npz", "npz_csr"])
def test_explicit_clients(kind, tmp_path):
    partitioner = Explicit(LISTS if kind == "list" else explicit_file(kind, tmp_path))
    partition = partitioner.partition(np.zeros(6, int), None, rng())
    assert [p.tolist() for p in partition] == [[0, 3], [1, 2, 5]]
    with pytest.raises(ConfigurationError, match="2 clients of its own, got 3"):
        partitioner.partition(np.zeros(6, int), 3, rng())


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0, 1], [1]], "sample 1 in several"),
        ([[0], [6]], "indices in 0..5, got 0..6"),
        ([[0], [-1]], "indices in 0..5, got -1..0"),
        ([[0.5]], "client 0: expected a flat list of integers"),
        ([[0, [1]]], "client 0: expected a flat list of integers"),
        ([], "expected one list of sample indices per client"),
    ],
)
def test_explicit_refuses_wrong_lists(lists, message):
    with pytest.raises(DataError, match=message):
        Explicit(lists).partition(np.zeros(6, int), None, rng())


def test_explicit_refuses_empty_clients_and_bad_files(tmp_path):
    with pytest.raises(ConfigurationError, match="client 1 has 0"):
        Explicit([[0, 1], []]).partition(np.zeros(6, int), None, rng())
    for name, content in (("absent.json", None), ("broken.json", "[[1,"), ("text.npz", "no archive"), ("deep.json", "[" * 10**5)):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            Explicit(str(tmp_path / name)).partition(np.zeros(6, int), None, rng())


def test_partition_indexing():
    partition = Partition.from_assignment(np.array([1, 0, -1, 1]), 3)
    assert [p.tolist() for p in partition] == [[1], [0, 3], []]
    assert partition.sizes.tolist() == [1, 2, 0]
    assert partition.clients.tolist() == [0, 1, 1]
    assert partition[1].base is not None  # a view
    for client in (-1, 3):
        with pytest.raises(IndexError, match=r"0..2"):
            partition[client]


def test_check_partition_finds_broken_offsets():
    with pytest.raises(DataError, match="offsets"):
        check_partition(Partition(np.arange(3), np.array([0, 2, 1, 3])), 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=15), st.integers(1, 5), st.integers(0, 1000))
def test_fill_small_moves_as_few_samples_as_possible(sizes, min_samples, seed):
    assignment = rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    if len(assignment) < min_samples * len(sizes):
        return
    repaired = fill_small(assignment, len(sizes), min_samples, rng(seed))
    after = np.bincount(repaired, minlength=len(sizes))
    assert after.min() >= min_samples
    assert (repaired != assignment).sum() == np.maximum(min_samples - np.array(sizes), 0).sum()
    donors = after < np.array(sizes)  # levelled down together: no other client stays larger than a donor ends, plus one
    assert not donors.any() or after.max() <= after[donors].min() + 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda p: sum(p) > 0.01))
def test_cut_follows_the_proportions(count, proportions):
    shares = np.array(proportions) / sum(proportions)
    sizes = np.bincount(cut(count, shares), minlength=len(shares))
    assert sizes.sum() == count
    assert np.abs(sizes - shares * count).max() <= 1 + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 1000))
def test_holdout_is_disjoint_and_leaves_a_sample(samples, clients, fraction, seed):
    partition = IID().partition(labels_of(samples), min(clients, samples), rng(seed))
    train, held = split_holdout(partition, fraction, rng(seed))
    for i, whole in enumerate(partition):
        assert sorted([*train[i], *held[i]]) == sorted(whole)
        assert len(train[i]) >= 1
        assert len(held[i]) == min(round(fraction * len(whole)), len(whole) - 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 1000))
def test_renumbered_samples_lie_client_by_client_and_stay_with_their_clients(samples, clients, fraction, seed):
    whole = Partition.from_assignment(rng(seed).integers(-1, clients, samples), clients)
    if not len(whole.order):
        return
    train, held = split_holdout(whole, fraction, rng(seed))
    order = client_by_client(train, held)
    assert len(set(order.tolist())) == len(order) == whole.order.max() + 1
    assert np.array_equal(train.renumbered(order).order, np.arange(len(train.order)))
    for before, after in zip((*whole, *held), (*whole.renumbered(order), *held.renumbered(order)), strict=True):
        assert np.array_equal(order[after], before)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 1000))
def test_stratified_choice_keeps_proportions(samples, fraction, seed):
    labels = labels_of(samples, 4)
    chosen = stratified_choice(labels, int(fraction * samples), rng(seed))
    assert len(set(chosen.tolist())) == len(chosen) == int(fraction * samples)
    expected = np.bincount(labels, minlength=4) * len(chosen) / samples
    assert np.abs(np.bincount(labels[chosen], minlength=4) - expected).max() <= 2
