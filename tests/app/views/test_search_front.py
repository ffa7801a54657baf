"""What a running search has found by now."""

from __future__ import annotations

import pytest

from bitatlas.app.views.search_front import build_search_front


def row(payload: int, kl: float, tokens: int, spent: int) -> dict[str, object]:
    return {"payload_bytes": payload, "kl": kl, "tokens": tokens, "forward_equivalents": spent}


def test_nothing_before_the_first_candidate():
    assert build_search_front([], 10, "EvoPress", "running") is None
    assert build_search_front([row(1, float("nan"), 5, 5)], 10, "EvoPress", "running") is None


def test_the_front_is_of_what_was_read_on_the_longest_text():
    rows = [
        row(100, 0.01, 64, 10),
        row(100, 0.9, 512, 20),
        row(110, 0.5, 512, 40),
        row(120, 0.7, 512, 30),
        row(130, 0.4, 512, 50),
    ]
    view = build_search_front(rows, 7, "EvoPress", "running")
    assert view is not None
    assert view.weights_bytes == (
        107,
        117,
        137,
    )  # the lucky short text does not count, the dominated one neither
    assert view.kl == (0.9, 0.5, 0.4)
    assert view.spent == (20, 30, 40, 50)
    assert view.best == pytest.approx((0.9, 0.7, 0.5, 0.4))
    assert "EvoPress, running: measured KL 0.4" in view.title
    assert "5 candidates after 50 forward-equivalent tokens" in view.detail
    assert view.to_dict()["tokens"] == 512
