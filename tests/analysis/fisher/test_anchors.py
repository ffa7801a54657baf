"""Anchors: allocations on the hull, least squares by hand, slopes against differences of the real KL."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.fisher.anchors import LEVELS, SHARE, anchored, belief, front_choices, slope_table
from bitatlas.analysis.fisher.deltas import DeltaStore
from bitatlas.analysis.fisher.probes import ProbePass
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.fisher_projection import FisherProjection
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, SensitivityTable

MIXED = ("nf4-g64", "fp4-g32", "int4-g64", "int8-g128")
BYTES = np.array([2.0, 3.0, 4.0, 8.0])


def a_table(units: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 5, units)[:, None]
    damage = rng.lognormal(0, 1, (units, 1)) * 4.0 ** -np.arange(4) * rng.uniform(0.8, 1.2, (units, 4))
    return damage, size * BYTES


def test_choices_are_the_best_for_their_bytes():
    damage, nbytes = a_table(6)
    rows = np.arange(6)
    total = damage.max(1).sum()
    found = front_choices(damage, nbytes, (0.05 * total, 0.3 * total, 0.8 * total, 2 * total))
    levels = damage[rows, found].sum(1)
    assert (levels <= np.array([0.05, 0.3, 0.8, 2]) * total).all()
    assert (np.diff(levels) > 0).all()
    assert (found[-1] == 0).all()  # a level above everything: the worst there is
    every = np.array(list(itertools.product(range(4), repeat=6)))
    costs, sizes = damage[rows, every].sum(1), nbytes[rows, every].sum(1)
    for choice, cost in zip(found, levels):
        assert cost <= costs[sizes <= nbytes[rows, choice].sum()].min() * (1 + 1e-9)


def test_the_same_allocation_counts_once_and_the_unknown_stay_large():
    damage, nbytes = a_table(5)
    damage[2] = np.nan
    found = front_choices(damage, nbytes, (1e6, 2e6))
    assert found.tolist() == [[0, 0, 3, 0, 0]]


def test_of_a_quadratic_nothing_is_left_but_its_table():
    """Independent errors and no cross terms: slopes and the table's own bend say the table again."""
    damage, nbytes = a_table(7, 3)
    choices = front_choices(damage, nbytes, (0.1, 0.5, 2.0))
    rows = np.arange(7)
    # <c (Q_x - W), Q_f - Q_x> with orthogonal errors is -c |Q_x - W|^2 = -2 D_x, and 0 for x itself.
    slopes = np.zeros((len(choices), 7, 4))
    for a, x in enumerate(choices):
        slopes[a] = -2 * damage[rows, x][:, None]
        slopes[a, rows, x] = 0
    np.testing.assert_allclose(slope_table(damage, choices, slopes, bend=1.0), damage, rtol=1e-6)


def test_where_damages_add_up_to_more_the_slopes_know_it():
    """KL = s + s^2 / 2 of the sum s of damages: at an anchor, a change costs 1 + s times as much."""
    damage, nbytes = a_table(9, 4)
    rows = np.arange(9)
    choices = front_choices(damage, nbytes, (1.5,))
    s = damage[rows, choices[0]].sum()
    slopes = (1 + s) * (damage - damage[rows, choices[0]][:, None])[None]
    want = (1 + s) * (damage - damage.min(1, keepdims=True)) + damage.min(1, keepdims=True)
    np.testing.assert_allclose(slope_table(damage, choices, slopes, bend=0.0), want, rtol=1e-6)


def test_slopes_count_where_the_kl_is_high():
    damage, nbytes = a_table(40, 6)
    share = belief(damage / 100, nbytes)
    assert (share >= 0).all()
    assert (share < SHARE).all()
    rows = np.arange(40)
    assert (share[rows, damage.argmin(1)] == share.min()).all()  # the best saves nothing
    assert (np.diff(share, axis=1) <= 1e-12).all()  # and fewer bits are bought at higher levels
    # A format at the very price at which the whole front costs as much as the second level.
    at = np.abs(share - SHARE / 2).argmin()
    unit, fmt = divmod(int(at), 4)
    price = (damage[unit, fmt] - damage[unit, 3]) / 100 / (nbytes[unit, 3] - nbytes[unit, fmt])
    total = damage[rows, (damage / 100 + price * nbytes).argmin(1)].sum() / 100
    assert share[unit, fmt] == pytest.approx(SHARE * total / (total + LEVELS[1]), rel=0.2)


def test_parts_of_a_text_hold_units_and_texts_are_averaged():
    damage, nbytes = a_table(4, 5)
    choices = front_choices(damage, nbytes, (0.5, 2.0))
    rng = np.random.default_rng(0)
    texts = [rng.normal(size=(len(choices), 4, 4)) for _ in range(3)]
    parts = [
        {"choice": choices, "slopes": n * text[:, at], "place": np.array(at), "sequences": np.array([i]), "tokens": np.array(n)}
        for i, (text, n) in enumerate(zip(texts, (10, 30, 20))) for at in ([0, 2], [1, 3])
    ]  # fmt: skip
    scaled = 2 * damage
    value, error = anchored(scaled, 0.1 * damage, damage, nbytes, parts, MIXED)
    mean = slope_table(damage, choices, (10 * texts[0] + 30 * texts[1] + 20 * texts[2]) / 60)
    share = belief(scaled, nbytes)
    want = (1 - share) * scaled + share * (mean + damage.min(1, keepdims=True))
    np.testing.assert_allclose(value, np.maximum(want, 0.05 * scaled), rtol=1e-9)
    assert (error >= 0.1 * damage * (1 - SHARE)).all()
    assert (error[:, :2] > 0.1 * damage[:, :2]).any()
    unknown = scaled.copy()
    unknown[1] = np.nan
    again, _ = anchored(unknown, 0.1 * damage, damage, nbytes, parts, MIXED)
    assert np.isnan(again[1]).all()
    assert np.isfinite(again[[0, 2, 3]]).all()


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "gpt2"])
def test_slopes_are_differences_of_the_kl(tiny_checkpoint, family):
    index = index_model(tiny_checkpoint(family))
    formats = [FORMATS["int2-g32"], FORMATS["int4-g32"]]
    ids = np.random.default_rng(3).integers(1, 250, (2, 12))
    ctx = MeasureContext(index, formats, calibration=CalibrationSet.of(ids))
    loaded, batch = ctx.loaded, torch.from_numpy(ids)
    with torch.no_grad():
        reference = loaded.logits(batch)
    store = DeltaStore(
        lambda key: ctx.weight(ctx.unit_by_key[key]),
        lambda key, f: ctx.candidate(ctx.unit_by_key[key], formats[f]),
        2, limit_bytes=1 << 30, dtype=torch.float32,
    )  # fmt: skip
    keys = index.unit_keys()
    place = {u.key: ctx.candidate(u, formats[i % 2]) for i, u in enumerate(index.units)}
    with loaded.swapped(place):
        slopes, kl = ProbePass(loaded, keys, store, "signs").slopes(batch, reference)
        with torch.no_grad():
            assert kl == pytest.approx(float(token_kl(reference, loaded.logits(batch)).sum()), rel=1e-6)
    for i in (0, len(keys) // 2, len(keys) - 1):
        unit, ends = index.units[i], []
        for step in (-1e-2, 1e-2):
            moved = place[unit.key] + step * (ctx.candidate(unit, formats[0]) - ctx.weight(unit))
            with torch.no_grad(), loaded.swapped({**place, unit.key: moved}):
                ends.append(float(token_kl(reference, loaded.logits(batch)).sum()))
        assert slopes[i, 0] == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=0.03, abs=1e-4 * kl)


def test_the_run_reads_its_own_table_and_can_be_cut_anywhere(tiny_checkpoint, tmp_path):
    ids = np.random.default_rng(3).integers(1, 250, (8, 20))
    names = ["int2-g32", "int3-g32", "int4-g32"]

    def run(folder, **settings):
        ctx = MeasureContext(
            index_model(tiny_checkpoint("qwen3_moe")), [FORMATS[n] for n in names],
            calibration=CalibrationSet.of(ids), settings={"front_tokens": 160, **settings},
        )  # fmt: skip
        return ctx, run_metric(FisherProjection(), ctx, tmp_path / folder)

    ctx, rows = run("a")
    front = [k for k in FisherProjection().plan(ctx) if k.startswith("front ")]
    assert len(front) == 1
    keys = ctx.index.unit_keys()
    tables = {
        m: SensitivityTable.from_rows([r for r in rows if r.metric == m], keys)
        for m in ("fisher_scaled", "fisher_anchored")
    }
    a, b = tables["fisher_scaled"].damage, tables["fisher_anchored"].damage
    assert np.array_equal(np.isnan(a), np.isnan(b))
    known = np.isfinite(a)
    assert (b[known] > 0).all()
    assert not np.allclose(a[known], b[known], rtol=0.01)
    assert (np.diff(b[known.all(1)], axis=1) <= 1e-12).all()
    for path in (tmp_path / "a").glob("front*.npz"):
        path.unlink()
    assert run("a")[1] == rows
    assert "fisher_anchored" not in {r.metric for r in run("b", front_tokens=0)[1]}
    assert not [k for k in FisherProjection().plan(run("c", whole_tokens=0)[0]) if k.startswith("front")]
