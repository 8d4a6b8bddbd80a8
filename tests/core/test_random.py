from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.core.random import derive_seed, numpy_generator, torch_generator

parts = st.lists(st.integers(-5, 1000) | st.text("ab1/s", max_size=4), min_size=1, max_size=4).map(tuple)


@given(parts, parts)
def test_seeds_are_equal_exactly_when_the_paths_are(a: tuple[int | str, ...], b: tuple[int | str, ...]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_a_slash_in_a_part_does_not_join_two_parts() -> None:
    assert derive_seed("a/sb") != derive_seed("a", "b")


def test_a_number_and_its_text_are_different_streams() -> None:
    assert derive_seed(1) != derive_seed("1")


def test_numpys_integers_count_as_integers() -> None:
    assert derive_seed(3, np.int64(5)) == derive_seed(3, 5)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, 1, 2, "batches") == 5425327528299445093


def test_generators_are_equal_by_path_and_differ_by_path() -> None:
    def draw(*path: int | str) -> list[float]:
        return torch.rand(4, generator=torch_generator(*path)).tolist() + numpy_generator(*path).random(4).tolist()

    assert draw(1, "x") == draw(1, "x")
    assert not set(draw(1, "x")) & set(draw(1, "y"))
    assert not set(draw(1, "x")) & set(draw(2, "x"))


def test_neighbouring_streams_are_uncorrelated() -> None:
    draws = torch.stack([torch.randn(2000, generator=torch_generator(0, client)) for client in range(20)])
    off_diagonal = torch.corrcoef(draws) - torch.eye(20)
    assert off_diagonal.abs().max() < 5 / 2000**0.5
