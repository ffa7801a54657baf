from __future__ import annotations

import math

from bitatlas.app.views.verify import build_verify
from bitatlas.cache.plans import PlanInfo


def _plan(id: str, metric: str, solver: str) -> PlanInfo:
    return PlanInfo(id, "m", metric, solver, 3.5, 1000, 0.04, 0.0)


def _measured(id: str) -> dict[str, object]:
    return {"allocation": id, "kl_mean": 0.08, "kl_p50": 0.01, "kl_p99": 0.5, "flips": 0.1, "ppl_before": 5.0, "ppl_after": 6.0,
            "tokens": 512}  # fmt: skip


def test_what_a_search_measured_is_no_prediction():
    """Neither as it is stored now, nor under the damage that searches used to name."""
    plans = [
        _plan("solved", "fisher_anchored", "mckp"),
        _plan("searched", "kl", "path"),
        _plan("older", "fisher_anchored", "path"),
        _plan("refined", "fisher_anchored", "mckp+refine"),
    ]
    view = build_verify(
        {p.id: p for p in plans}, [_measured(p.id) for p in plans], frozenset({"fisher_anchored"})
    )
    rows = {r.allocation: r for r in view.rows}
    assert rows["solved"].ratio == 0.5
    assert rows["solved"].label == "mckp on fisher_anchored"
    for name in ("searched", "older", "refined"):
        assert math.isnan(rows[name].ratio)
        assert "fisher_anchored" not in rows[name].label
    assert view.title.startswith("1 predictions checked")
