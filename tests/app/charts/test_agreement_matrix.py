"""The matrix as markup: every pair once, its number in words, colours from the scale."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitatlas.app.charts.agreement_matrix import agreement_matrix
from bitatlas.app.theme import palette


@pytest.mark.parametrize("dark", [False, True])
def test_every_pair_has_a_cell_with_its_number(dark: bool):
    p, rho = palette(dark), np.array([[1.0, -0.25, np.nan], [-0.25, 1.0, 0.5], [np.nan, 0.5, -1.0]])
    markup = agreement_matrix(("fisher", "alphaq", "<b>"), rho, p)
    cells = re.findall(r'title="([^"]+): ([^"]+)" style="[^"]*background:(#[0-9a-f]{6})', markup)
    assert [c[0] for c in cells[:3]] == ["fisher and fisher", "fisher and alphaq", "fisher and &lt;b&gt;"]
    assert [c[1] for c in cells] == [
        "1.00",
        "-0.25",
        "unknown",
        "-0.25",
        "1.00",
        "0.50",
        "unknown",
        "0.50",
        "-1.00",
    ]
    assert "<b>" not in markup
    assert cells[0][2] == p.diverging[0][1]  # complete agreement
    assert cells[8][2] == p.diverging[-1][1]
    assert cells[2][2] == p.unknown
    assert len({c[2] for c in cells}) == 5


def test_many_metrics_have_cells_without_numbers():
    n = 17
    markup = agreement_matrix(tuple(f"m{i}" for i in range(n)), np.eye(n), palette(False))
    assert markup.count("title=") == n * n
    assert ">1.00</div>" not in markup
    assert ">1.00</div>" in agreement_matrix(("a", "b"), np.eye(2), palette(False))
