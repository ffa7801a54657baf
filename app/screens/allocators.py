"""Allocators: which one gives the lowest damage at the same bytes, and what does it cost to ask?"""

from __future__ import annotations

import time

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app.charts import allocators as charts
from bitatlas.app.studies import Study, open_store
from bitatlas.app.views import allocators as views
from bitatlas.app.views import fit as fit_views
from bitatlas.app.views import fit_controls as controls
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import empty_state
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command, downloads
from bitatlas.solvers import SOLVERS, frontier, get_solver

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
        known = [n for n, s in SOLVERS.items() if s.available() and not s.USES_INTERACTION]
        chosen = st.multiselect("Allocators", known, default=[n for n in _START if n in known], key="allocators", bind="query-params",
                                format_func=lambda n: SOLVERS[n].TITLE)  # fmt: skip
    formats = tuple(controls.usual(study.tables[metric].formats))
    problem, cache = fit_cache.front(study, metric, formats, {})
    asked = [_front(study.index.digest, study.tables[metric].run, metric, formats, n, study) for n in chosen]
    asked += _searched(study)
    measured = fit_views.measured_points(study.verifications, fit_cache.sizes(study))
    view = views.build_allocators(
        asked, cache, study.index.kept_bytes, measured, metric, fit_cache.unit_of(metric)
    )
    with head:
        title(view.title, view.detail)
    st.plotly_chart(charts.fronts_chart(view, current_palette()), key="fronts", theme=None, config={"displayModeBar": False},
                    alt=view.title)  # fmt: skip
    frame = pd.DataFrame(
        [{"allocator": r.title, "gap": r.gap, "points": len(r.damage), "seconds": r.seconds, "evaluations": r.evaluations,
          "tokens": r.tokens, "damage": "measured KL" if r.measured else f"predicted, {view.metric}", "remark": r.words}
         for r in view.rows]
    )  # fmt: skip
    st.dataframe(frame, hide_index=True, column_config={
        "gap": st.column_config.NumberColumn("gap to the bound, median", format="percent"), "seconds": st.column_config.NumberColumn(format="%.3g"),
        "tokens": st.column_config.NumberColumn(help="Tokens that the real model read for the search; 0 = the table only")})  # fmt: skip
    cli_twin(
        command("frontier", study.index.path, metric=metric, solver=chosen[0] if chosen else "hull", formats=",".join(formats))
    )  # fmt: skip
    downloads("allocators", lambda: frame, view.to_dict, "allocators")


@st.cache_resource(max_entries=128, show_spinner="Solving")
def _front(
    digest: str, run: str, metric: str, formats: tuple[str, ...], name: str, _study: Study
) -> views.Asked:
    """One solver's front, at most seventeen points and eight seconds."""
    problem, _ = fit_cache.front(_study, metric, formats, {})
    solver, start = get_solver(name), time.perf_counter()
    try:
        found = frontier(problem, solver, points=_POINTS, time_limit_s=_SECONDS)
    except UserError as error:
        return views.Asked(name, solver.TITLE, None, words=str(error).splitlines()[0])
    return views.Asked(name, solver.TITLE, found, time.perf_counter() - start)


def _searched(study: Study) -> list[views.Asked]:
    """The fronts that searches on the real model have stored, the newest of each kind."""
    store, out = open_store(), {}
    for f in store.frontiers(study.index.digest):
        if f["metric"] == "kl" and f["solver"] not in out:
            tried = store.candidates(f["run"])
            out[f["solver"]] = views.Asked(
                f["solver"], f"{f['solver']} (search)", store.frontier(f["id"]), float("nan"), len(tried), sum(c.tokens for c in tried), True
            )  # fmt: skip
    return list(out.values())
