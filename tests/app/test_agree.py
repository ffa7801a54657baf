"""From a measured truth to the trust table: the jobs' work inline, the store, the rows, the CSV."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from scipy import stats

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import DamageRow, UserError
from bitatlas.analysis.trust import decode_choice
from bitatlas.app.tasks.agreeing import trust_csv, trust_rows
from bitatlas.app.work.measure import MeasureWork
from bitatlas.app.work.random_allocations import RandomAllocationsWork, random_allocations
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

FORMATS = ["int2-g32", "int3-g32", "int4-g32"]


def run(work, store):
    """What the worker does, in this process."""
    keys = work.plan()
    for described in work.runs():
        store.begin_run(**described)
    for key in keys:
        for name, rows in (work.run(key).get("rows") or {}).items():
            store.write_step(name, key, [DamageRow(*r) for r in rows])
    result = work.finish()
    for described in work.runs():
        store.finish_run(described["run"])
    return result


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tmp_path_factory):
    """A tiny model with a truth on one text, two metrics on another, one of them twice."""
    root = tmp_path_factory.mktemp("agree")
    rng = np.random.default_rng(0)
    for name in ("calibration", "held-out", "other", "longer"):
        words = ["".join(rng.choice(list("etaoinshr"), 4)) for _ in range(90)]
        (root / f"{name}.txt").write_text("\n".join(" ".join(rng.choice(words, 9)) for _ in range(200)))
    index = index_model(tiny_checkpoint("llama"))
    home = Home(root / "home")
    store = Store(home)
    store.put_model(index)
    common = {"model": index.path, "digest": index.digest, "tokens": 128, "seq_len": 16, "formats": FORMATS}
    allocations = {**common, "text": str(root / "held-out.txt"), "text_seed": 0, "n": 12, "low": 2.5, "high": 5.0,
                   "seed": 0, "cache_gib": 1.0}  # fmt: skip
    result = run(RandomAllocationsWork(allocations, home), store)
    for metrics, text, seed, settings in (
        (["kl_flip"], "held-out", 0, {"flips": 24}),
        (["fisher_projection", "weight_error", "quantmoe_outlier"], "calibration", 0, {"draws": 1}),
        (["fisher_projection"], "calibration", 1, {"draws": 1}),
        (["weight_error", "activation_error"], "calibration", 0, {}),
        (["activation_error"], "longer", 0, {}),
        (["activation_error"], "other", 0, {}),
    ):
        params = {
            **common,
            "metrics": metrics,
            "calibration": str(root / f"{text}.txt"),
            "seed": seed,
            "settings": settings,
        }
        if text == "longer":
            params |= {"tokens": 256}
        run(MeasureWork(params, home), store)
    return home, store, index, result


def test_budgets_are_spread_evenly_over_the_range(tiny_checkpoint):
    index = index_model(tiny_checkpoint("llama"))
    choices = random_allocations(index, ["int2-g32", "int3-g32", "int4-g32", "int8-g32"], 24, 2.5, 7.0, 3)
    formats = ["int2-g32", "int3-g32", "int4-g32", "int8-g32"]
    from bitatlas.kernels.formats import parse_format

    sizes = index.bytes_table([parse_format(f) for f in formats])
    bits = sizes[np.arange(sizes.shape[0]), choices].sum(1) * 8 / index.params
    counts = np.histogram(bits, np.linspace(sizes.min(1).sum() * 8 / index.params, 7.0, 9))[0]
    assert counts.min() >= 2
    for i, choice in enumerate(choices):
        if i % 2:  # a window: neighbours only
            assert choice.max() - choice.min() < len(formats) - 1
    assert any(np.ptp(choice) == len(formats) - 1 for choice in choices[::2])
    np.testing.assert_array_equal(choices, random_allocations(index, formats, 24, 2.5, 7.0, 3))
    with pytest.raises(UserError, match="no allocations between"):
        random_allocations(index, ["int8-g32"], 4, 2.5, 5.0, 0)


def test_candidates_keep_the_choice_and_the_spread(measured):
    _, store, index, result = measured
    found = store.candidates(result["run"])
    assert len(found) == 12
    for c in found:
        assert decode_choice(c.extra["choice"]).shape == (len(index.units),)
        assert c.objective == pytest.approx(np.mean(c.extra["sequences"]))
        assert c.extra["stderr"] == pytest.approx(
            np.std(c.extra["sequences"], ddof=1) / len(c.extra["sequences"]) ** 0.5
        )
        assert c.tokens == 128
        assert c.extra["bits"] == pytest.approx(c.payload_bytes * 8 / index.params)
    assert store.run(result["run"]).finished is not None


def test_the_trust_table(measured):
    home, store, index, _ = measured
    rows = {r.metric: r for r in trust_rows(store, index, home)}
    assert {"fisher", "fisher+pairs", "fisher_projection", "weight_error", "quantmoe_outlier"} <= set(rows)
    assert "kl_flip" not in rows  # a sample of flips cannot be judged by itself
    fisher = rows["fisher"]
    assert 20 <= fisher.flips <= 24
    assert fisher.allocations == 12
    assert fisher.spearman > 0.8
    assert 0.2 < fisher.ratio < 5
    assert sum(fisher.band_counts.values()) <= 12
    assert (fisher.calibration_runs, fisher.same_text) == (2, False)
    # Probes; the original and three uniform models; the original and both passes at four anchors.
    assert fisher.cost_ratio_same_text == pytest.approx((3 + 4 + 13) / (len(index.units) * 3))
    assert np.isnan(rows["fisher+pairs"].flip_spearman)
    assert np.isnan(rows["quantmoe_outlier"].flip_spearman)
    assert rows["weight_error"].forward_equivalents == 0


def test_the_choice_of_text_is_told(measured):
    home, store, index, _ = measured
    row = next(r for r in trust_rows(store, index, home) if r.metric == "fisher")
    tables = [store.table(e.run, "fisher", index.unit_keys()).damage.ravel()
              for e in store.metrics_of(index.digest) if e.metric == "fisher"]  # fmt: skip
    assert len(tables) == 2
    assert row.calibration_least == pytest.approx(stats.spearmanr(*tables).statistic)
    assert row.other_texts == ()  # the same text by another seed
    assert np.isnan(row.text_least)


def test_texts_are_compared_where_only_the_text_differs(measured):
    home, store, index, _ = measured
    row = next(r for r in trust_rows(store, index, home) if r.metric == "activation_error")
    runs = [e.run for e in store.metrics_of(index.digest) if e.metric == "activation_error"]
    assert len(runs) == 3  # one of them of twice the tokens
    assert store.run(row.run).provenance["tokens"] == 128
    (other,) = (r for r in runs if r != row.run and store.run(r).provenance["tokens"] == 128)
    x, y = (store.table(r, "activation_error", index.unit_keys()).damage.ravel() for r in (row.run, other))
    assert [n.rpartition("/")[2] for n in row.other_texts] == ["calibration.txt"]
    assert row.text_least == pytest.approx(stats.spearmanr(x, y, nan_policy="omit").statistic)
    assert row.text_ratio == pytest.approx(np.exp(np.nanmedian(np.log(x / y))))
    assert row.calibration_runs == 2


def test_the_csv_has_a_column_for_every_band_and_no_nan(measured):
    home, store, index, _ = measured
    text = trust_csv(trust_rows(store, index, home))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == len({line["metric"] for line in lines})
    assert any(c.startswith("band_") for c in lines[0])
    assert "nan" not in text.lower()


def test_without_a_truth(tmp_path, tiny_checkpoint):
    index = index_model(tiny_checkpoint("llama"))
    home = Home(tmp_path)
    store = Store(home)
    store.put_model(index)
    with pytest.raises(UserError, match="no truth") as caught:
        trust_rows(store, index, home)
    assert "bitatlas truth" in caught.value.fix
