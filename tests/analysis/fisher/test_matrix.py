"""Whole allocations from the probe matrix, against a loop; how much of the pairs is believed."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import ProbeMatrix, load_probes, pack_names, score_allocation
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


def test_score_of_an_allocation_and_its_error():
    """The error against repeated samples: 40 sequences of 2 draws, correlated units, unequal lengths."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(6, 6)) * 0.4 + np.eye(6)
    choice = np.array([0, 1, 2, 0, 1, 2])
    got = []
    for _ in range(200):
        heat = rng.gamma(4, 0.25, 40).repeat(2)[:, None, None]
        a = np.einsum("suf,uv->svf", rng.normal(size=(80, 6, 3)), mix) * np.sqrt(heat)
        got.append(score_allocation(matrix(a, np.arange(40).repeat(2)), choice, 0.5))
    values, errors = np.array(got).T
    gram = mix.T @ mix
    same = choice[:, None] == choice[None, :]
    exact = (np.trace(gram) + 0.5 * (gram * same * (1 - np.eye(6))).sum()) / (2 * 16)
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / 200**0.5)
    assert 0.85 < errors.mean() / values.std() < 1.15
    one = matrix(a, np.arange(40).repeat(2))
    assert score_allocation(one, choice)[0] == pytest.approx(one.score(choice)[0])
    table = np.ones((6, 3))
    assert score_allocation(one, choice, 0.0, table)[0] == pytest.approx(6.0)


def test_the_weight_of_the_pairs_does_not_hang_on_one_deal_of_the_folds():
    rng = np.random.default_rng(6)
    common = rng.normal(size=(90, 1, 1))
    some = matrix(0.3 * common + rng.normal(size=(90, 40, 3)))
    once = [some.cross_validate(seed=s, repeats=1)[0] for s in range(8)]
    often = [some.cross_validate(seed=s)[0] for s in range(8)]
    assert np.ptp(often) <= np.ptp(once)
    assert np.ptp(often) <= 0.35


def test_a_saved_matrix_comes_back(tmp_path):
    m = matrix(np.random.default_rng(7).normal(size=(6, 4, 3)), np.arange(3).repeat(2))
    back = load_probes(m.save(tmp_path / "deep" / "probes.npz"))
    np.testing.assert_array_equal(back.a, m.a)
    assert back.units == m.units
    assert back.formats == m.formats
    np.testing.assert_array_equal(back.damage(), m.damage())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["probes.npz"]
