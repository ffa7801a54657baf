"""Whole allocations from the probe matrix, against a loop; how much of the pairs is believed."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import ProbeMatrix, load_probes, pack_names
from bitatlas.kernels.errors import UserError

FORMATS = ("int2-g64", "int3-g64", "int4-g64")


def matrix(a, sequence=None, tokens=16):
    s, u, _ = a.shape
    return ProbeMatrix(
        tuple(f"u{i}" for i in range(u)), FORMATS, a.astype(np.float32), np.ones((s, u)),
        np.arange(s) if sequence is None else sequence, np.full(s, tokens), np.full((s, u), tokens),
        np.ones((u, len(FORMATS))),
    )  # fmt: skip


def test_forms_equal_a_loop():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(7, 5, 3)).astype(np.float32)
    m = matrix(a)
    choices = rng.integers(0, 3, (4, 5))
    additive, quadratic = m.forms(choices)
    factor, scale = m.interaction_factor()
    for i, choice in enumerate(choices):
        add = quad = 0.0
        for s in range(7):
            row = [float(a[s, u, c]) for u, c in enumerate(choice)]
            add += sum(x * x for x in row) / (2 * 7 * 16)
            quad += sum(row) ** 2 / (2 * 7 * 16)
        assert additive[i] == pytest.approx(add, rel=1e-6)
        assert quadratic[i] == pytest.approx(quad, rel=1e-6)
        picked = factor[:, np.arange(5), choice].sum(1)
        assert float((picked**2).mean() * scale) == pytest.approx(quad, rel=1e-5)
        assert m.score(choice, shrinkage=0.25)[0] == pytest.approx(add + 0.25 * (quad - add), rel=1e-6)


def test_a_posterior_table_replaces_the_additive_part():
    m = matrix(np.random.default_rng(1).normal(size=(6, 4, 3)))
    table = np.full((4, 3), 2.0)
    table[0, 0] = np.nan
    choice = np.zeros(4, int)
    own = m.damage()[0, 0]
    assert m.score(choice, shrinkage=0.0, damage=table)[0] == pytest.approx(6.0 + own)
    additive, quadratic = m.forms(choice)
    again, other = m.forms(choice, table)
    assert other - again == pytest.approx(quadratic - additive)


def test_shrinkage_believes_real_interactions_and_doubts_noise():
    rng = np.random.default_rng(2)
    common = rng.normal(size=(200, 1, 1))
    real = matrix(common + 0.2 * rng.normal(size=(200, 30, 3)))
    assert real.shrinkage >= 0.9
    noise = matrix(rng.normal(size=(24, 30, 3)))
    assert noise.shrinkage <= 0.4


def test_draws_of_a_sequence_stay_in_one_fold():
    """A sequence copied as ten draws must not vouch for itself."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(12, 30, 3))
    copied = matrix(base.repeat(10, 0), np.arange(12).repeat(10))
    assert copied.shrinkage <= 0.5


def test_parts_are_joined_in_order_and_strangers_ignored(tmp_path):
    rng = np.random.default_rng(4)
    a = rng.normal(size=(4, 2, 3)).astype(np.float32)
    for name, rows in (("b", [0, 1]), ("a", [2, 3])):
        np.savez(
            tmp_path / f"{name}.npz", a=a[rows], gsq=np.ones((2, 2)), sequence=np.array(rows), tokens=np.full(2, 9),
            reached=np.full((2, 2), 9), norm_sq=np.ones((2, 3)), names=pack_names(["x", "y"], FORMATS),
        )  # fmt: skip
    np.savez(tmp_path / "other.npz", z=np.ones(3))
    m = load_probes(tmp_path)
    assert m.units == ("x", "y")
    assert m.formats == FORMATS
    np.testing.assert_array_equal(m.a, a)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError):
        load_probes(empty)


def test_another_number_of_units_is_refused():
    with pytest.raises(UserError):
        matrix(np.zeros((2, 3, 3))).score(np.zeros(4, int))
