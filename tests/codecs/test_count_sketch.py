from __future__ import annotations

import pytest
import torch

from fedlight.codecs import CountSketchCodec
from fedlight.codecs.count_sketch import CountSketch
from fedlight.core.codec import Codec, Context, State
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round

DIM = 2000


def heavy(entries: int = 5, noise: float = 0.01) -> torch.Tensor:
    """A few large entries in small noise ``[DIM]``."""
    generator = torch.Generator().manual_seed(0)
    update = noise * torch.randn(DIM, generator=generator)
    update[torch.randperm(DIM, generator=generator)[:entries]] += torch.linspace(2, 4, entries)
    return update


@pytest.mark.parametrize("columns", [1, 7, 100, 2000, 3000])
def test_every_row_deals_every_entry_to_one_column_equally_many_to_each(columns: int) -> None:
    sketch = CountSketch(DIM, 3, columns, seed=0)
    seen = torch.stack([sketch(torch.eye(DIM)[i]) for i in range(0, DIM, 97)])
    assert (seen.reshape(len(seen), 3, columns).abs().sum(-1) == 1).all()
    loads = torch.stack([row.reshape(columns, -1) for row in sketch.order])
    assert all(torch.equal(row.flatten().sort().values, torch.arange(row.numel())) for row in loads)


def test_the_hash_comes_from_the_seed_and_is_not_downloaded() -> None:
    def sketch(seed: int) -> torch.Tensor:
        return CountSketchCodec(4, seed=seed).bind(Layout.vector(DIM)).encoder.encode(heavy(), Context(), None)

    assert torch.equal(sketch(1), sketch(1)) and not torch.equal(sketch(1), sketch(2))
    assert not CountSketchCodec(4).bind(Layout.vector(DIM)).encoder.state_dict()


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_an_estimate_is_right_on_average_over_hashes(rows: int) -> None:
    update = torch.randn(60, generator=torch.Generator().manual_seed(1))
    estimates = torch.stack([(s := CountSketch(60, rows, 12, seed)).estimate(s(update)) for seed in range(1500)])
    assert ((estimates.mean(0) - update).abs() <= 5 * estimates.std(0) / 1500**0.5).all()


def test_heavy_entries_are_found_in_the_sum_of_what_clients_sketch() -> None:
    """None of the clients has to have all of them."""
    parts = torch.stack([heavy() * (torch.arange(DIM) % 4 == i) * 4 for i in range(4)])
    decoded = simulate_round(CountSketchCodec(4, top_k=5).bind(Layout.vector(DIM)), parts)
    assert torch.equal(decoded.nonzero(), (heavy() > 1).nonzero())
    torch.testing.assert_close(decoded, torch.where(heavy() > 1, heavy(), 0), atol=0.2, rtol=0)


def run(codec: Codec, updates: list[torch.Tensor], state: State) -> list[torch.Tensor]:
    return [simulate_round(codec, u[None], context=Context(round=i), server_state=state) for i, u in enumerate(updates)]


def test_as_written_what_is_applied_and_what_is_kept_are_what_was_sent() -> None:
    """S_e after + S(applied) == S_e before + S(update), Algorithm 1."""
    codec = CountSketchCodec(4, masking=False).bind(Layout.vector(DIM))
    state: State = {}
    sketch = codec.encoder.sketch
    expected = torch.zeros(codec.encoder.code_dim)
    for number in range(4):
        update = heavy() * (1 + number)
        (applied,) = run(codec, [update], state)
        expected = expected + sketch(update)
        torch.testing.assert_close(state["error"] + sketch(applied), expected, rtol=1e-4, atol=1e-4)
        expected = state["error"]


def test_with_masking_the_columns_of_what_was_applied_are_empty() -> None:
    codec = CountSketchCodec(4, momentum=0.9).bind(Layout.vector(DIM))
    state: State = {}
    (applied,) = run(codec, [heavy()], state)
    touched = codec.encoder.sketch(applied) != 0
    assert touched.any() and not state["error"][touched].any() and not state["momentum"][touched].any()
    assert state["error"][~touched].any()


def test_feedback_gives_small_entries_their_turn() -> None:
    """Two entries, of which one fits a round: the smaller one is applied later, with all that has gathered."""
    update = torch.zeros(DIM)
    update[10], update[20] = 1.0, 0.4
    codec = CountSketchCodec(4, top_k=1).bind(Layout.vector(DIM))
    applied = run(codec, [update] * 12, {})
    total = torch.stack(applied).sum(0)
    assert {int(one.nonzero()) for one in applied} == {10, 20}
    assert float(total[20]) == pytest.approx(0.4 * 12, abs=2.0) and float(total[10]) == pytest.approx(12, abs=2.0)


def test_momentum_adds_up_what_is_never_applied() -> None:
    update = heavy(0, 1.0)
    codec = CountSketchCodec(4, top_k=1, momentum=0.5, masking=False).bind(Layout.vector(DIM))
    state: State = {}
    run(codec, [update] * 3, state)
    torch.testing.assert_close(state["momentum"], 1.75 * codec.encoder.sketch(update))


def test_masking_keeps_the_error_bounded_where_nothing_stands_out() -> None:
    update = heavy(0, 1.0)
    norms = []
    for masking in (True, False):
        state: State = {}
        run(CountSketchCodec(8, masking=masking).bind(Layout.vector(DIM)), [update] * 40, state)
        norms.append(float(state["error"].norm() / update.norm()))
    assert norms[0] < 10 < 1e3 < norms[1]


def test_a_sketch_without_a_column_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one column in each of 5 rows but `ratio` 8 leaves 4 numbers: choose a smaller `ratio`"):
        CountSketchCodec(8).bind(Layout.vector(39))


def test_the_sketch_is_as_long_as_the_ratio_allows() -> None:
    assert CountSketchCodec(8, rows=5).bind(Layout.vector(DIM)).encoder.code_dim == 250
    assert CountSketchCodec(8, rows=3).bind(Layout.vector(DIM)).encoder.code_dim == 249
