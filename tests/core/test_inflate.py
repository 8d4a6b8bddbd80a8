from __future__ import annotations

import tracemalloc
import zlib

import pytest

from fedlight.core.errors import CodecMismatchError
from fedlight.core.inflate import deflate_text, inflate, inflate_text


@pytest.mark.parametrize("size", [0, 1, 300])
def test_a_text_holds_what_it_was_made_of(size: int) -> None:
    content = bytes(number % 7 for number in range(size))
    assert inflate_text(deflate_text(content), size, "levels") == content


@pytest.mark.parametrize("most", [0, 10])
def test_a_bomb_takes_no_more_memory_than_there_may_be(most: int) -> None:
    bomb = zlib.compress(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(CodecMismatchError, match=f"at most {most} "):
        inflate(bomb, most)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("damaged", [b"", zlib.compress(b"abc")[:-1], zlib.compress(b"abc") + b"d", b"something else"])
def test_what_is_damaged_is_refused(damaged: bytes) -> None:
    with pytest.raises(CodecMismatchError, match=r"compressed bytes"):
        inflate(damaged, 3)


@pytest.mark.parametrize("text", ["", "~~~~~~", "\u00fc", None, deflate_text(b"ab"), deflate_text(b"abcd")])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(CodecMismatchError, match=r"xpected"):
        inflate_text(text, 3, "levels")
