"""Selections and pins as text, undo and redo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitatlas.analysis.schema import UserError
from bitatlas.app.selection import EditList, Selection, decode_pins, encode_pins


@given(st.sets(st.integers(0, 400)))
def test_selection_survives_the_url(ids):
    chosen = Selection.of(ids)
    assert Selection.decode(chosen.encode(), 401) == chosen


@pytest.mark.parametrize(
    ("ids", "text"),
    [(range(7), "0-6"), ([3], "3"), ([1, 2], "1-2"), ([1, 4, 7, 10], "1-10:3"), ([0, 1, 2, 12, 40, 43, 46], "0-2,12-40:28,43,46")],
)  # fmt: skip
def test_runs_are_short(ids, text):
    encoded = Selection.of(ids).encode()
    assert Selection.decode(encoded, 100).ids == tuple(sorted(ids))
    assert len(encoded) <= len(text)


@pytest.mark.parametrize("text", ["x", "5-", "1-2:0", "0-500", "-3", "1-2:-1"])
def test_a_bad_link_says_so(text):
    with pytest.raises(UserError, match="cannot be read"):
        Selection.decode(text, 100)


def test_pins_undo_redo():
    a, b = Selection.of([1, 2, 3]), Selection.of([3])
    edits = EditList().add(a, "int8-g64").add(b, "int4-g64")
    assert edits.pins() == {1: "int8-g64", 2: "int8-g64", 3: "int4-g64"}
    assert edits.undo().pins() == dict.fromkeys((1, 2, 3), "int8-g64")
    assert edits.undo().redo().pins() == edits.pins()
    assert edits.undo().undo().undo().pins() == {}
    freed = edits.undo().add(a, "")
    assert freed.pins() == {}
    assert not freed.can_redo


def test_pins_survive_the_url():
    pins = {0: "int8-g64", 1: "int8-g64", 9: "int2-g64"}
    assert decode_pins(encode_pins(pins), 10).pins() == pins
    with pytest.raises(UserError, match="no format"):
        decode_pins("1-2=int7-g1", 10)
