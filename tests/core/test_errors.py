"""The search for fedlight's own error in a chain of errors, and errors that name the wrong argument alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedlight.aggregation.secure.sums import SumFormat
from fedlight.clients.schedule import Cosine
from fedlight.compare.plan import Comparison
from fedlight.core.errors import ConfigurationError, own_error
from fedlight.data.augment import Affine
from fedlight.privacy import CentralDP


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Affine(degrees=181.0), "degrees"),
        (lambda: Affine(scale=1.0), "scale"),
        (lambda: Affine(shift=-1.0), "shift"),
        (lambda: Affine(shear=-1.0), "shear"),
        (lambda: Cosine(0), "rounds"),
        (lambda: Cosine(5, 1.5), "final"),
        (lambda: SumFormat(((3, 4),), clients=0), "clients"),
        (lambda: SumFormat(((3, 4),), clients=2, max_weight=0), "max_weight"),
        (lambda: SumFormat(((3, 0),), clients=2), "limits"),
        (lambda: CentralDP(clip=0.0, noise_multiplier=1.0), "clip"),
        (lambda: CentralDP(clip=1.0, noise_multiplier=1.0, delta=1.0), "delta"),
        (lambda: Comparison("digits", {"none": None}, seeds=[-1]), "seeds"),
        (lambda: Comparison("digits", {"none": None}, tune_seeds=[-1]), "tune_seeds"),
    ],
)
def test_the_wrong_argument_is_named_alone(make: Callable[[], object], name: str):
    with pytest.raises(ConfigurationError, match=f"^Expected `{name}` [^`]*$"):
        make()


def test_the_own_error_is_found_among_causes_and_contexts():
    inner, middle, outer = ConfigurationError("expected `ratio` >= 1"), ValueError("no group `codec`"), TypeError("cannot be parsed")
    middle.__context__ = inner
    outer.__cause__ = middle
    assert own_error(outer) is inner
    assert own_error(middle) is inner
    assert own_error(ValueError("another library's")) is None
    assert own_error(None) is None


def test_a_chain_of_errors_that_ends_in_itself_is_searched_once():
    first, second = ValueError("a parser's"), KeyError("raised while the first was handled, and the first again while this one was")
    first.__context__, second.__context__ = second, first
    assert own_error(first) is None
    second.__cause__ = ConfigurationError("expected a codec")
    assert own_error(first) is second.__cause__
