"""Allocators: which one gives the lowest damage at the same bytes, and what does it cost to ask?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import MEASURED_KL, Allocation, UserError
from bitatlas.app.charts import allocators as charts
from bitatlas.app.fronts import kept_front
from bitatlas.app.studies import Study, open_store
from bitatlas.app.tasks.interaction import has_probes, with_probes
from bitatlas.app.views import allocators as views
from bitatlas.app.views import fit as fit_views
from bitatlas.app.views import fit_controls as controls
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import empty_state
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.search_panel import search_panel
from bitatlas.app.widgets.twin import cli_twin, command, downloads
from bitatlas.solvers import SOLVERS, get_solver

__all__ = ["page"]

_START = ("hull", "mckp", "baq", "q4_k_m", "uniform")
_POINTS, _SECONDS = 17, 8.0


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.damage_metrics:
        title("There is nothing to allocate with yet")
        empty_state(
            "Allocators compares the fronts of all solvers on one measured metric.",
            "Measure a model",
            screen="run",
        )
        return
    head = st.container()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        metric = st.selectbox("Metric", study.damage_metrics, index=controls.preferred(study.damage_metrics), key="allocators_metric",
                              bind="query-params", width=240)  # fmt: skip
        probes = has_probes(study.tables[metric])
        known = [n for n, s in SOLVERS.items() if s.available() and (probes or not s.USES_INTERACTION)]
        chosen = st.multiselect("Allocators", known, default=[n for n in _START if n in known], key="allocators", bind="query-params",
                                format_func=lambda n: SOLVERS[n].TITLE)  # fmt: skip
    formats = tuple(controls.usual(study.tables[metric].formats))
    problem, cache = fit_cache.front(study, metric, formats, {})
    cost = views.cost_of(study.runs[metric]) if metric in study.runs else None
    asked = [_front(study.index.digest, study.tables[metric].run, metric, formats, n, study) for n in chosen]
    asked = [
        replace(a, metric_tokens=cost.tokens) if cost and SOLVERS[a.name].NEEDS_DAMAGE else a for a in asked
    ]
    asked += _searched(study)
    measured = fit_views.measured_points(study.verifications, fit_cache.sizes(study))
    view = views.build_allocators(
        asked, cache, study.index.kept_bytes, measured, metric, fit_cache.unit_of(metric), cost
    )
    with head:
        title(view.title, view.detail)
    st.plotly_chart(charts.fronts_chart(view, current_palette()), key="fronts", theme=None, config={"displayModeBar": False},
                    alt=view.title)  # fmt: skip
    frame = pd.DataFrame(
        [{"allocator": r.title, "gap": r.gap, "points": len(r.damage), "seconds": r.seconds, "evaluations": r.evaluations,
          "tokens": r.tokens, "metric tokens": r.metric_tokens, "damage": "measured KL" if r.measured else f"predicted, {view.metric}", "remark": r.words}
         for r in view.rows]
    )  # fmt: skip
    st.dataframe(frame, hide_index=True, column_config={
        "gap": st.column_config.NumberColumn("gap to the bound, median", format="percent"), "seconds": st.column_config.NumberColumn(format="%.3g"),
        "evaluations": st.column_config.NumberColumn(help="Of the objective, over all points of the front; 0 = not counted, as where one sort gives the front"),
        "tokens": st.column_config.NumberColumn(help="Forward-equivalent tokens that the real model read for the search; 0 = the table only"),
        "metric tokens": st.column_config.NumberColumn(help="The same, for measuring the damages that it solves with")})  # fmt: skip
    cli_twin(
        command("frontier", study.index.path, metric=metric, solver=chosen[0] if chosen else "hull", formats=",".join(formats))
    )  # fmt: skip
    search_panel(study)
    downloads("allocators", lambda: frame, view.to_dict, "allocators")


@st.cache_resource(max_entries=128, show_spinner="Solving")
def _front(
    digest: str, run: str, metric: str, formats: tuple[str, ...], name: str, _study: Study
) -> views.Asked:
    """One solver's front, at most seventeen points and eight seconds; from the store where it was solved before."""
    problem, _ = fit_cache.front(_study, metric, formats, {})
    solver, words = get_solver(name), ""
    try:
        found = kept_front(
            open_store(), digest, run, problem, solver, points=_POINTS, time_limit_s=_SECONDS,
            prepare=lambda p: with_probes(p, _study.tables[metric], solver),
        )  # fmt: skip
    except UserError as error:
        return views.Asked(name, solver.TITLE, None, words=str(error).splitlines()[0])
    if solver.USES_INTERACTION:
        # Drawn by the measure of all the others, so that the bound holds for it too.
        found = replace(found, predicted=np.array([problem.objective(choice) for choice in found.choice]))
        words = "chosen with pairs of units counted; its damage here is their sum without pairs, as for the others"
    return views.Asked(name, solver.TITLE, found, found.seconds, found.evaluations, found.tokens, words=words)


def _searched(study: Study) -> list[views.Asked]:
    """The fronts that searches on the real model have stored, the newest of each kind."""
    newest: dict[str, dict[str, Any]] = {}
    for f in open_store().frontiers(study.index.digest):
        if f["metric"] == MEASURED_KL:
            newest.setdefault(f["solver"], f)
    return [_search(f["id"], f["run"], study) for f in newest.values()]


@st.cache_resource(max_entries=128, show_spinner=False)
def _search(id: str, run: str, _study: Study) -> views.Asked:
    """A stored search: what it found and what that cost, both from the store."""
    store = open_store()
    found = store.frontier(id)
    evaluations, tokens = found.evaluations, found.tokens
    if not tokens:
        # Stored before fronts said what they cost: every candidate knows what had been spent by then.
        tried = store.candidates(run)
        evaluations = len(tried)
        tokens = max((int((c.extra or {}).get("forward_equivalents") or 0) for c in tried), default=0)
    plans = (store.allocation(a.id) for a in _study.allocations if found.solver in a.solver)
    about = next((p.provenance.settings for p in plans if _told(p).get("candidates") == run), {})
    # A shipped study may lack the run that a search began with.
    base = next((r for r in store.runs(_study.index.digest) if r.run == about.get("run")), None)
    return views.Asked(
        found.solver, f"{found.solver} (search)", found, found.seconds, evaluations, tokens, True, metric_tokens=views.cost_of(base).tokens if base else 0
    )  # fmt: skip


def _told(plan: Allocation) -> dict[str, Any]:
    settings = plan.provenance.settings
    return dict(settings.get("search") or settings.get("refined") or {})
