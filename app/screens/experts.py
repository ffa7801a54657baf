"""Experts: how do they differ, and which are hardly ever used?"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.app import state
from bitatlas.app.charts import experts as charts
from bitatlas.app.studies import Study
from bitatlas.app.views import experts as views
from bitatlas.app.views.fit_controls import preferred
from bitatlas.app.widgets.boxes import empty_state
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.expert_budget import expert_budget
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.kept import kept
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.picking import drawn
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.tables:
        title("No experts to show yet")
        empty_state("Traffic, damage and spectra of every expert will stand here, once they are measured.", "Measure a model", screen="run")  # fmt: skip
        return
    known = views.quantities(study)
    head = st.container()
    quantity, metric, format = _controls(study, known)
    if known:
        view = kept(
            study,
            "experts",
            quantity,
            metric,
            format,
            make=lambda: views.build(study, quantity, metric, format),
        )
        with head:
            title(view.title, view.subtitle)
        _map(study, view, (quantity, metric, format))
    else:
        with head:
            words = ("No expert has been measured yet", "Measure routing, a damage or alphaq.") if study.index.n_experts else (
                f"{study.index.name} is dense: it has layers, but no experts", "")  # fmt: skip
            title(*words)
    _profile(study, metric, format)
    if known and metric:
        expert_budget(study, metric)
    cli_twin(command("measure", study.index.path, metric="routing,alphaq" if study.index.n_experts else "lim,zd"))  # fmt: skip


def _controls(study: Study, known: tuple[str, ...]) -> tuple[str, str, str]:
    quantity, metric, format = "", "", ""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        if known:
            start = "damage" if "damage" in known else known[0]
            quantity = st.segmented_control("Show", known, default=start, required=True, key="quantity", bind="query-params") or start  # fmt: skip
        if study.damage_metrics:
            metric = st.selectbox("Damage", study.damage_metrics, index=preferred(study.damage_metrics), key="expert_metric", bind="query-params", width=185)  # fmt: skip
            formats = study.tables[metric].formats
            format = next((f for f in formats if f.startswith("int3")), formats[0])
            if len(formats) > 1:
                format = st.select_slider("Format", formats, format, key="format", bind="query-params", width=215)  # fmt: skip
    return quantity, metric, format


def _map(study: Study, view: views.ExpertsView, asked: tuple[str, str, str]) -> None:
    quantity, look = asked[0], current_palette()
    shown = state.shown_selection("experts", (study.index.digest, asked))
    figure = kept(
        study,
        "experts_map",
        asked,
        look.dark,
        shown.ids,
        make=lambda: charts.expert_map(view, look, view.slots_of(shown)),
    )

    def chosen() -> None:
        state.select(view.units_of(view.slots_in(drawn("expert_map"))), from_chart=True)

    st.plotly_chart(
        figure, key="expert_map", on_select=chosen, selection_mode=("box", "lasso"), theme=None,
        height=charts.HEIGHT, config={"displaylogo": False, "toImageButtonOptions": {"filename": f"{study.index.name}-experts", "scale": 2}},
        alt=f"{view.title}. {view.subtitle}",
    )  # fmt: skip

    def frame() -> pd.DataFrame:
        rows = [
            {"layer": layer, "expert": e, quantity: view.value[i, e], "tokens": view.tokens[i, e]}
            for i, layer in enumerate(view.layers)
            for e in range(view.experts)
            if view.state[i, e] != views.ABSENT
        ]
        return pd.DataFrame(rows)

    downloads(f"{study.index.name}-experts", frame, lambda: {"title": view.title, "quantity": quantity, "layers": list(view.layers),
              "value": view.value.tolist(), "tokens": view.tokens.tolist()}, "experts")  # fmt: skip


def _profile(study: Study, metric: str, format: str) -> None:
    look = current_palette()
    view = kept(study, "profile", metric, format, make=lambda: views.layer_profile(study, metric, format))
    if not view.scores:
        return
    st.markdown("#### Layer by layer")
    st.plotly_chart(kept(study, "profile_chart", metric, format, look.dark, make=lambda: charts.profile(view, look)), key="layer_profile", theme=None, config={"displayModeBar": False},
                    alt="Block scores by layer")  # fmt: skip
