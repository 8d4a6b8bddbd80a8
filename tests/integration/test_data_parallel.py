"""Codes are what two gloo processes all-reduce; what they decode to is what torch's own hooks do, where the code is the same."""

from __future__ import annotations

import pytest
import torch

from tests.data_parallel import conformance, known, resume
from tests.known_modules import KNOWN, Heads
from tests.own import LitClassifier
from tests.processes import in_two_processes


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory):
    ranks = in_two_processes(conformance, tmp_path_factory.mktemp("conformance"))
    for name, result in ranks[0].items():
        assert torch.equal(result["weights"], ranks[1][name]["weights"]), f"{name}: processes drifted apart"
    return ranks[0]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("codec", "hook"),
    [
        ("identity", "none"),
        ("identity", "allreduce"),
        ("half", "fp16"),
        ("identity, accumulated", "none, accumulated"),  # and clipped, in bf16-mixed
        ("boring", "boring, none"),
    ],
)
def test_equals_torchs_own_hook_bit_for_bit(fits, codec, hook):
    assert torch.equal(fits[codec]["weights"], fits[hook]["weights"])


def test_a_codec_that_rounds_is_another_run(fits):
    assert not torch.equal(fits["half"]["weights"], fits["none"]["weights"])
    torch.testing.assert_close(fits["integers"]["weights"], fits["none"]["weights"], atol=0.15, rtol=0)


def test_bytes_are_those_of_the_codes(fits):
    dim, steps = len(fits["none"]["weights"]), 6
    assert fits["identity"]["bytes"] == fits["identity"]["full"] == 4 * dim * steps
    assert fits["half"]["bytes"] == 2 * dim * steps
    assert fits["identity"]["figures"]["gradients/bytes"] == 4 * dim
    assert fits["half"]["figures"]["gradients/ratio"] == 2
    # Two of six steps in full, then one byte a number; three fits are sent as well.
    assert fits["integers"]["bytes"] > 4 * dim * 2 + dim * 4
    # One of six in full; then a byte for each number of two factors, and two peaks of eight bytes, of each tensor that has a code.
    shapes = [tuple(p.shape) for p in LitClassifier(norm=False).parameters()]
    coded = [shape for shape in shapes if len(shape) == 2 and shape[0] * shape[1] >= 50]
    short = sum(sum(shape) + 16 for shape in coded) + 4 * (dim - sum(rows * columns for rows, columns in coded))
    assert coded and fits["bytes"]["bytes"] == 4 * dim + 5 * short


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_on_both(tmp_path):
    """What each process had left out, fitted codecs and counters are in the checkpoint."""
    for result in in_two_processes(lambda: resume(tmp_path), tmp_path):
        for kind in ("fitted", "bytes"):
            whole, resumed = result[f"whole, {kind}"], result[f"resumed, {kind}"]
            assert torch.equal(whole["weights"], resumed["weights"]), kind
            assert (whole["bytes"], whole["full"]) == (resumed["bytes"], resumed["full"])


@pytest.fixture(scope="module")
def known_fits(tmp_path_factory: pytest.TempPathFactory):
    return in_two_processes(known, tmp_path_factory.mktemp("known"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_modules_that_everybody_knows_end_where_ddp_ends_bit_for_bit(known_fits, kind):
    """Weights, and what else a module holds; the processes differ where DDP leaves them to, as in what the last step did to buffers."""
    for rank in known_fits:
        plain, coded = rank[f"{kind.__name__}, none"]["state"], rank[f"{kind.__name__}, identity"]["state"]
        assert all(torch.equal(tensor, coded[name]) for name, tensor in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_a_code_that_loses_something_trains_them_together(known_fits, kind):
    plain, coarse, other = (known_fits[rank][f"{kind.__name__}, {name}"] for rank, name in ((0, "none"), (0, "coarse"), (1, "coarse")))
    assert torch.equal(coarse["weights"], other["weights"]) and bool(torch.isfinite(coarse["weights"]).all())
    assert not torch.equal(coarse["weights"], plain["weights"]) and 0 < coarse["bytes"] < coarse["full"]
    before = kind().state_dict()
    moved = {name for name, tensor in plain["state"].items() if not torch.equal(tensor, before[name])}
    assert {name for name, tensor in coarse["state"].items() if not torch.equal(tensor, before[name])} == moved
    assert kind is not Heads or not any(name.startswith("never") for name in moved)
