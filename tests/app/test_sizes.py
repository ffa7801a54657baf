from __future__ import annotations

import pytest

from bitatlas.app.sizes import format_bytes, parse_bytes
from bitatlas.kernels.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("8G", 8 << 30), ("1.5 kb", 1500), ("123456", 123456), ("500MB", 500_000_000)],
)
def test_sizes_are_read(text: str, count: int):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "8 lightyears", "0", "1e9"])
def test_what_is_not_a_size_is_refused(text: str):
    with pytest.raises(UserError, match="not a size"):
        parse_bytes(text)


def test_words():
    assert format_bytes(1536 << 20) == "1.5 GiB"
    assert format_bytes(12) == "12 B"
