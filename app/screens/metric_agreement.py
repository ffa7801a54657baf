"""Metrics: can the cheap one be trusted?"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import FORMATS, NO_FORMAT
from bitatlas.app import state
from bitatlas.app.charts import metric_agreement as charts
from bitatlas.app.charts.agreement_matrix import agreement_matrix
from bitatlas.app.selection import Selection
from bitatlas.app.studies import Study
from bitatlas.app.views import metric_agreement as views
from bitatlas.app.views.fit_controls import preferred
from bitatlas.app.views.regions import inside
from bitatlas.app.widgets.boxes import empty_state
from bitatlas.app.widgets.data import get_matrix, get_trust, the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.kept import kept
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.picking import drawn
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]

_TRUST = {
    "metric": "Metric", "badge": "Badge", "flips": "Flips", "flip_within": "Flips: rank in a format", "flip_spearman": "Flips: rank, all",
    "allocations": "Allocations", "spearman": "Allocations: rank", "band_least": "Worst half-bit band", "ratio": "Predicted / measured",
    "top_overlap": "Top-k overlap", "cost_ratio_same_text": "Cost / every flip", "calibration_least": "With itself, other seed or text",
    "text_least": "With itself, other text", "text_ratio": "Its values / on other text",
}  # fmt: skip


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or len(study.tables) < 2:
        title("There are no two metrics to compare yet")
        empty_state("Here metrics are compared with each other and with measured KL, once two have been measured.",
                    "Measure a model", screen="run")  # fmt: skip
        return
    head = st.container()
    controls = _controls(study)
    view = kept(study, "metrics", controls, make=lambda: views.build(study, controls))
    trust = get_trust(study.index.digest)
    with head:
        title(view.title, view.subtitle)
    left, right = st.columns([1.15, 1], gap="large")
    with left:
        _scatter(study, view, controls)
    with right:
        names, rho = get_matrix(study.index.digest, controls.format)
        with st.container(key="agreement_matrix"):
            st.html(agreement_matrix(names, rho, current_palette()))
    _trust(study, trust)
    _differ(study, view, controls)


def _controls(study: Study) -> views.MetricsControls:
    names = list(study.tables)
    formats = [f for f in FORMATS if any(f in t.formats for t in study.tables.values())] or [NO_FORMAT]
    roles = [views.ALL_ROLES, *study.columns.roles]
    known = study.damage_metrics
    first = names.index(known[preferred(known)]) if known else 0
    second = (
        names.index("kl_flip") if "kl_flip" in names and first != names.index("kl_flip") else int(first == 0)
    )
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        x = st.selectbox("Across", names, index=first, key="metric_x", bind="query-params", width=190)
        y = st.selectbox("Up", names, index=second, key="metric_y", bind="query-params", width=190)
        start = next((f for f in formats if f.startswith("int3")), formats[0])
        chosen = start
        if len(formats) > 1:
            chosen = st.select_slider("Format", formats, start, key="format", bind="query-params", width=215)
        role = st.selectbox("Role", roles, key="role", bind="query-params", width=130)
        k = st.number_input("Top k", 1, 1000, 20, key="top_k", bind="query-params", width=110)
    return views.MetricsControls(x, y, chosen, role, int(k))


def _scatter(study: Study, view: views.MetricsView, controls: views.MetricsControls) -> None:
    look = current_palette()
    figure = kept(
        study,
        "rank_scatter",
        controls,
        look.dark,
        make=lambda: charts.rank_scatter(view, controls.x, controls.y, study.keys, look),
    )

    def chosen() -> None:
        state.select(Selection.of(view.ids[inside(drawn("rank_scatter"), view.x, view.y)]), from_chart=True)

    st.plotly_chart(figure, key="rank_scatter", on_select=chosen, selection_mode=("box", "lasso"), theme=None,
                    config={"displaylogo": False}, alt=view.title)  # fmt: skip


def _trust(study: Study, trust: list[views.Trust]) -> None:
    if not trust:
        st.caption("No truth has been measured for this model, so no metric has a badge. On the shell:")
        cli_twin(command("truth", study.index.path))
        return
    frame = pd.DataFrame([{label: row.to_dict()[name] for name, label in _TRUST.items()} for row in trust])
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("#### Against measured KL: single flips and random whole allocations")
        downloads(f"{study.index.name}-trust", lambda: frame, lambda: {"rows": [r.to_dict() for r in trust]}, "trust")  # fmt: skip
    number = st.column_config.NumberColumn
    shown = {
        label: number(label, format="%.2f")
        for label in _TRUST.values()
        if frame[label].dtype == np.float64 and label != _TRUST["cost_ratio_same_text"]
    }
    shown[_TRUST["cost_ratio_same_text"]] = number(format="%.2e")
    st.dataframe(frame, hide_index=True, key="trust_table", column_config=shown, height=min(38 + 35 * len(frame), 320))  # fmt: skip
    cli_twin(command("agree", study.index.path, out="trust.csv"))


def _differ(study: Study, view: views.MetricsView, controls: views.MetricsControls) -> None:
    columns = ["unit", f"rank in {controls.x}", f"rank in {controls.y}"]
    rows = [(study.keys[i], a, b) for i, a, b in view.differ.tolist()]
    frame = pd.DataFrame(rows, columns=pd.Index(dict.fromkeys(columns)) if len(set(columns)) == 3 else None)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"#### {len(rows)} units stand in only one of the two tops")
        downloads("metrics", lambda: frame, lambda: _data(view, controls), "metrics")
    if rows:
        st.dataframe(frame, hide_index=True, key="differ_table", height=min(38 + 35 * len(rows), 300))


def _data(view: views.MetricsView, controls: views.MetricsControls) -> dict[str, object]:
    return {"title": view.title, "subtitle": view.subtitle, "controls": asdict(controls), "spearman": view.spearman,
            "overlap": view.overlap, "units": view.ids.tolist(), "x": view.x.tolist(), "y": view.y.tolist()}  # fmt: skip
