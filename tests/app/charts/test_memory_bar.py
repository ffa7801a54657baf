"""The memory bar: boxes whose widths add up, with the numbers in words."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from bitatlas.app.charts.memory_bar import memory_bar
from bitatlas.app.sizes import format_bytes
from bitatlas.app.theme import palette
from bitatlas.app.views.fit import FitView, MemorySegment

SEGMENTS = (
    MemorySegment("weights", "2-bit weights", 1 << 29, 2),
    MemorySegment("kept", "norms, routers, biases", 1 << 20),
    MemorySegment("kv", "KV cache, 8192 tokens x 2", 1 << 28),
    MemorySegment("reserve", "reserve", 1 << 27),
    MemorySegment("free", "free", (1 << 30) - (1 << 29) - (1 << 20) - (1 << 28) - (1 << 27)),
)


@pytest.fixture
def view() -> FitView:
    return FitView(
        'a "quoted" <b>', "", SEGMENTS, (), (1 << 29, 0.1), 2.5, 0.1, 0.0, np.zeros(1, np.int64), ("int2-g64",), "fisher", "nats",
        1 << 30, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_the_boxes_fill_the_bar_and_every_number_is_there(view: FitView, dark: bool):
    markup = memory_bar(view, palette(dark))
    assert sum(float(w) for w in re.findall(r"width:([\d.]+)%;background", markup)) == pytest.approx(
        100, abs=0.01
    )
    assert 'title="2-bit weights: 536,870,912 bytes (50.0%)"' in markup
    for s in SEGMENTS:
        assert s.label in markup
    assert f">{format_bytes(1 << 29)}</div>" in markup  # inside the wide box
    assert f">{format_bytes(1 << 20)}</div>" not in markup  # too narrow for its number


def test_names_are_no_markup(view: FitView):
    named = replace(SEGMENTS[0], label="<script>x</script>")
    markup = memory_bar(replace(view, segments=(named, *SEGMENTS[1:])), palette(False))
    assert "<script>" not in markup
    assert '"quoted" <b>' not in markup
