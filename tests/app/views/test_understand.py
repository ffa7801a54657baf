"""The views of the Metrics, Unit and Experts pages against plain loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from bitatlas.analysis.schema import NO_FORMAT, SensitivityTable, UserError
from bitatlas.analysis.trust import Trust
from bitatlas.app.charts import experts as expert_charts
from bitatlas.app.charts import metric_agreement as metric_charts
from bitatlas.app.charts import unit as unit_charts
from bitatlas.app.studies import Study
from bitatlas.app.theme import DARK, LIGHT
from bitatlas.app.views import experts, metric_agreement, unit, unit_inputs


def free_table(index, name, values):
    column = np.asarray(values, np.float64)[:, None]
    return SensitivityTable(
        name,
        index.unit_keys(),
        (NO_FORMAT,),
        column,
        np.full_like(column, np.nan),
        np.ones(column.shape, np.int64),
    )


@pytest.fixture(scope="module")
def routed(fakes):
    """Four layers of eight experts with routing; expert 3 of layer 1 was never reached."""
    index = fakes.moe_index(4, 8, "moe-4x8")
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 900, (5, 8)).astype(float)
    tokens[1, 3] = 0
    at = np.array([(u.layer, u.expert) for u in index.units])
    count = np.where(at[:, 1] >= 0, tokens[at[:, 0], at[:, 1]], np.nan)
    damage = fakes.damage_table(index)
    lim = np.where(at[:, 0] >= 0, -np.cos(at[:, 0]), np.nan)
    tables = {
        "fisher_projection": damage, "other": fakes.damage_table(index, "other", seed=4), "alpha_hill": fakes.alpha_table(index),
        "routing_count": free_table(index, "routing_count", count), "routing_frequency": free_table(index, "routing_frequency", count / 1000),
        "lim": free_table(index, "lim", lim),
    }  # fmt: skip
    return Study(index, tables)


def test_two_metrics_unit_by_unit(routed):
    view = metric_agreement.build(
        routed, metric_agreement.MetricsControls("fisher_projection", "other", "int3-g64", k=10)
    )
    a, b = (routed.tables[n].select(["int3-g64"]).damage[:, 0] for n in ("fisher_projection", "other"))
    good = np.isfinite(a) & np.isfinite(b)
    assert view.spearman == pytest.approx(stats.spearmanr(a[good], b[good]).statistic)
    ids = np.flatnonzero(good)
    tops = [{ids[i] for i in sorted(range(len(ids)), key=lambda i: -v[ids[i]])[:10]} for v in (a, b)]
    assert view.overlap == pytest.approx(len(tops[0] & tops[1]) / 10)
    assert {int(i) for i in view.differ[:, 0]} == tops[0] ^ tops[1]
    assert {int(i) for i in view.ids[view.top == metric_agreement.BOTH]} == tops[0] & tops[1]
    gaps = np.abs(view.differ[:, 1] - view.differ[:, 2])
    assert (np.diff(gaps) <= 0).all()
    assert f"{view.spearman:.2f}" in view.title
    down = metric_agreement.build(
        routed, metric_agreement.MetricsControls("other", "alpha_hill", "int3-g64", "down", 5)
    )
    assert {routed.index.units[i].role for i in down.ids} == {"down"}
    with pytest.raises(UserError, match="was not measured"):
        metric_agreement.build(routed, metric_agreement.MetricsControls("gone", "other", "int3-g64"))


def test_the_matrix_equals_scipy_pair_by_pair(routed):
    names, rho = metric_agreement.matrix(routed, "int4-g64")
    assert names[:2] == ("fisher_projection", "other")
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            x, y = (metric_agreement.values(routed.tables[n], "int4-g64") for n in (a, b))
            both = np.isfinite(x) & np.isfinite(y)
            want = stats.spearmanr(x[both], y[both]).statistic
            assert rho[i, j] == pytest.approx(want, nan_ok=True)


def test_badges_in_words():
    rows = [Trust("a", spearman=0.99, allocations=64, band_least=0.95, flip_spearman=0.9, flip_within=0.8, flips=200, ratio=1.05, badge="trusted")]  # fmt: skip
    assert metric_agreement.trust_badge("a", rows) == ":green-badge[trusted]"
    assert metric_agreement.trust_badge("b", rows) == ":gray-badge[not judged]"
    line = metric_agreement.trust_line("a", rows)
    assert "0.95 in its worst half-bit band" in line
    assert "predicted / measured 1.05" in line


def test_a_unit(routed):
    key = "model.layers.2.self_attn.q_proj"
    i = unit.find_unit(routed, key)
    assert unit.find_unit(routed, r"layers\.2.*q_proj") == i
    view = unit.build(routed, "fisher_projection", i)
    table = routed.tables["fisher_projection"]
    column = table.select(["int3-g64"]).damage[:, 0]
    assert view.rank == 1 + int((column > column[i]).sum())
    assert view.of == np.isfinite(column).sum()
    assert (np.diff(view.bits) > 0).all()
    np.testing.assert_array_equal(view.damage, table.damage[i])
    role = [j for j, u in enumerate(routed.index.units) if u.role == "q"]
    np.testing.assert_allclose(view.middle, np.median(table.damage[role], 0))
    assert view.siblings == 3
    assert len(view.values["metric"]) == 6 + 6 + 4
    worst = unit.worst(routed, "fisher_projection")
    assert unit.build(routed, "fisher_projection", worst).rank == 1
    second = unit.find_unit(routed, unit.neighbour(routed, "fisher_projection", worst, 1))
    assert unit.build(routed, "fisher_projection", second).rank == 2
    assert unit.neighbour(routed, "fisher_projection", second, -1) == routed.keys[worst]
    unknown = int(np.flatnonzero(np.isnan(column))[0]) if np.isnan(column).any() else None
    if unknown is not None:
        assert "unknown" in unit.build(routed, "fisher_projection", unknown).title
    with pytest.raises(UserError, match="no unit is called"):
        unit.find_unit(routed, "layers.99.q")


def test_the_expert_map(routed):
    view = experts.build(routed, "damage x frequency", "fisher_projection", "int3-g64")
    damage = routed.tables["fisher_projection"].select(["int3-g64"]).damage[:, 0]
    count = routed.tables["routing_count"].damage[:, 0]
    for layer in range(4):
        for e in range(8):
            ids = [i for i, u in enumerate(routed.index.units) if (u.layer, u.expert) == (layer, e)]
            want = damage[ids].sum() * count[ids[0]] / 1000
            if count[ids[0]] == 0 or np.isnan(want):
                assert view.state[layer, e] == experts.UNKNOWN
                assert np.isnan(view.z[layer, e])
            else:
                assert view.value[layer, e] == pytest.approx(want)
                assert view.z[layer, e] == pytest.approx(np.log10(want), rel=1e-5)
            assert view.units_of([layer * 8 + e]).ids == tuple(ids)
    assert view.state[1, 3] == experts.UNKNOWN
    assert "1 never reached" in view.subtitle
    assert "carry half the damage x frequency" in view.title


def test_never_reached_is_hatched_on_every_map(routed):
    assert experts.quantities(routed) == ("frequency", "damage", "damage x frequency", "alpha")
    for quantity in experts.quantities(routed):
        view = experts.build(routed, quantity, "fisher_projection", "int3-g64")
        assert view.state[1, 3] == experts.UNKNOWN
        figure = expert_charts.expert_map(view, DARK)
        (hatched,) = figure.layout.shapes
        assert "M2.5,1.5L3.5,0.5" in hatched.path  # layer 1, expert 3
    with pytest.raises(UserError, match="routing weight is not known"):
        experts.build(routed, "routing weight")


def test_block_scores_by_layer(routed, dense):
    profile = experts.layer_profile(routed, "fisher_projection", "int3-g64")
    assert set(profile.scores) == {"fisher_projection of int3-g64", "lim"}  # alpha differs within a block
    np.testing.assert_allclose(profile.scores["lim"] * profile.largest["lim"], -np.cos(np.arange(4)))
    assert experts.quantities(dense) == ()


def test_charts_of_eighteen_thousand_experts_are_light(moe):
    view = experts.build(moe, "damage", "fisher_projection", "int2-g64")
    assert view.z.shape == (48, 128)
    assert len(expert_charts.expert_map(view, LIGHT).to_json()) < 600_000
    two = metric_agreement.build(
        moe, metric_agreement.MetricsControls("fisher_projection", "fisher_projection", "int2-g64")
    )
    assert two.spearman == pytest.approx(1.0)
    figure = metric_charts.rank_scatter(two, "a", "b", moe.keys, LIGHT)
    marks = sum(len(t.x) for t in figure.data if t.type == "scatter" and t.x[0] is not None)
    (density,) = [t for t in figure.data if t.type == "heatmap"]
    assert marks + np.asarray(density.customdata).sum() == len(two.ids)
    assert len(figure.to_json()) < 250_000


def test_inputs_of_a_unit():
    rng = np.random.default_rng(5)
    edges = 2.0 ** np.arange(-6, 5)
    values = np.concatenate([rng.lognormal(-1, 1, 50_000).clip(max=15), np.zeros(1_000), [40.0] * 3])
    counts = np.array([np.sum((values >= a) & (values < b)) for a, b in zip((0, *edges), (*edges, np.inf))])
    arrays = {"edges": edges, "counts": np.stack([np.zeros_like(counts), counts])}
    view = unit_inputs.build(arrays, 1)
    assert view.total == len(values) == view.below + view.above + view.counts.sum()
    assert view.above == 3
    assert view.below == np.sum(values < edges[0])
    assert view.counts[0] > 0
    assert view.counts[-1] > 0
    assert len(view.edges) == len(view.counts) + 1
    for told, q in ((view.median, 0.5), (view.rare, 0.9999)):
        assert told / 2 <= np.quantile(values, q) <= told  # upper edge of the bin it falls in
    assert f"{len(values):,} values" in view.words
    assert "are zero or below" in view.words
    assert sum(view.columns()["inputs"]) == view.counts.sum()
    assert json.loads(json.dumps(view.to_dict()))["total"] == view.total
    figure = unit_charts.input_histogram(view, LIGHT)
    assert sum(figure.data[0].y) == view.counts.sum()
    bars = figure.data[0]
    np.testing.assert_allclose(10 ** (np.asarray(bars.x) - np.asarray(bars.width) / 2), view.edges[:-1])
    unreached = unit_inputs.build(arrays, 0)
    assert unreached.total == 0
    assert "No calibration token" in unreached.words
    assert unit_inputs.build({}, 0) is None
    zeros = unit_inputs.build({"edges": edges, "counts": np.eye(len(edges) + 1, dtype=int)[:1] * 7}, 0)
    assert (zeros.total, zeros.below, len(zeros.counts)) == (7, 7, 0)
    assert not unit_charts.input_histogram(zeros, DARK).data[0].y


def test_evidence_of_a_weight(tiny_checkpoint):
    from bitatlas.analysis.model_index import index_model
    from bitatlas.analysis.weights import WeightReader
    from bitatlas.app.evidence import weight_evidence

    index = index_model(tiny_checkpoint("llama"))
    i = next(i for i, u in enumerate(index.units) if u.role == "down")
    found = weight_evidence(index, i)
    with WeightReader(index) as reader:
        weight = reader.get(index.units[i]).double().numpy()
    assert found.counts.sum() == weight.size
    want = np.sort(np.linalg.svd(weight, compute_uv=False) ** 2)
    np.testing.assert_allclose(found.eigenvalues, want, rtol=1e-4, atol=1e-6 * want[-1])
    assert found.kurtosis == pytest.approx(stats.kurtosis(weight.ravel()), abs=1e-3)
    assert unit_charts.spectrum(found, LIGHT).data[0].mode == "markers"
    assert sum(unit_charts.histogram(found, DARK).data[0].y) == weight.size
