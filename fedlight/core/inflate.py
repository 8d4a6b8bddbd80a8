"""Compressed bytes, read into no more memory than their reader has room for."""

from __future__ import annotations

import base64
import binascii
import zlib

from fedlight.core.errors import CodecMismatchError


def inflate(data: bytes, most: int) -> bytes:
    """Return what ``zlib.compress`` made ``data`` of.

    Raises:
        CodecMismatchError: if it is damaged, goes on after its end, or holds more than ``most`` bytes, of which no more are made.

    >>> inflate(zlib.compress(b"code"), 4)
    b'code'
    >>> inflate(zlib.compress(bytes(10**6)), 4)
    Traceback (most recent call last):
    fedlight.core.errors.CodecMismatchError: Expected at most 4 compressed bytes but got more of them
    """
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(data, most + 1)  # one more than there may be: a limit of 0 would be none
    except zlib.error as error:
        raise CodecMismatchError(f"Expected compressed bytes but could not read them: {error}") from error
    if len(content) > most:
        raise CodecMismatchError(f"Expected at most {most:,} compressed bytes but got more of them")
    if not decoder.eof or decoder.unused_data:
        raise CodecMismatchError("Expected whole compressed bytes but some are missing, or others follow")
    return content


def deflate_text(content: bytes) -> str:
    """Return bytes in few letters, for a plan."""
    return base64.b85encode(zlib.compress(content, 9)).decode()


def inflate_text(text: str, size: int, what: str) -> bytes:
    """Return the ``size`` bytes that ``deflate_text`` wrote: ``what``, one a coefficient.

    Raises:
        CodecMismatchError: if it is another text, or one of more or fewer bytes.
    """
    try:
        content = inflate(base64.b85decode(text), size)
    except (ValueError, TypeError, binascii.Error) as error:
        raise CodecMismatchError(f"Expected the {what} of {size:,} coefficients as compressed text but: {error}") from error
    if len(content) != size:
        raise CodecMismatchError(f"Expected the {what} of {size:,} coefficients but got {len(content):,}")
    return content
