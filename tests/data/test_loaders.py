import pytest

from fedlight.core.errors import DataError
from fedlight.data import datamodule
from fedlight.data.datamodule import Batches, batch_bounds


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("samples", "batch_size"), [(7, 1), (100, 1), (101, 10), (1000, 333), (359, 1024)])
def test_sharded_evaluation_covers_each_sample_once_in_step(world, samples, batch_size, monkeypatch):
    seen: list[int] = []
    lengths = set()
    for rank in range(world):
        monkeypatch.setattr(datamodule, "rank_and_world", lambda rank=rank: (rank, world))
        loader = Batches(samples, lambda part: list(range(samples))[part], batch_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(0 < len(batch) <= batch_size + (world > 1) for batch in batches)
        lengths.add(len(batches))
        seen += [sample for batch in batches for sample in batch]
    assert seen == list(range(samples))
    assert len(lengths) == 1


def test_fewer_samples_than_processes_is_refused():
    with pytest.raises(DataError, match="each of 4 processes, got 3"):
        batch_bounds(3, 10, 0, 4)
