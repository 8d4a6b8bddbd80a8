"""The search for fedlight's own error in a chain of errors."""

from __future__ import annotations

from fedlight.core.errors import ConfigurationError, own_error


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
