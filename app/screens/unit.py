"""Unit: why is this matrix sensitive?"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import evidence, state
from bitatlas.app.charts import unit as charts
from bitatlas.app.selection import Selection
from bitatlas.app.studies import Study
from bitatlas.app.views import metric_agreement, unit_inputs
from bitatlas.app.views import unit as views
from bitatlas.app.views.fit_controls import preferred
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import get_trust, the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]

_CONFIG = {"displayModeBar": False}


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.damage_metrics:
        title("No damage has been measured yet")
        empty_state("A unit's page shows what fewer bits do to it and why, once a damage has been measured.",
                    "Measure a model", screen="run")  # fmt: skip
        return
    head = st.container()
    metric, unit = _controls(study)
    if unit is None:
        return
    view = views.build(study, metric, unit)
    with head:
        title(view.title, view.subtitle)
    left, right = st.columns([1.4, 1], gap="large")
    with left:
        st.plotly_chart(charts.damage_curve(view, current_palette()), key="damage_curve", theme=None, config=_CONFIG, alt=view.title)  # fmt: skip
    with right:
        _everything(study, view)
    _evidence(study, view)


def _controls(study: Study) -> tuple[str, int | None]:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        metric = st.selectbox(
            "Metric",
            study.damage_metrics,
            index=preferred(study.damage_metrics),
            key="unit_metric",
            bind="query-params",
            width=185,
        )
        chosen = state.selection().ids
        fallback = chosen[0] if chosen and chosen[0] < len(study.keys) else views.worst(study, metric)
        text = st.text_input("Unit (name or regular expression)", key="unit", bind="query-params", placeholder=study.keys[fallback], width=420)  # fmt: skip
        try:
            unit = views.find_unit(study, text) if text else fallback
        except UserError as e:
            error_box(e)
            return metric, None
        for label, step, icon in (("Worse", -1, "arrow_upward"), ("Better", 1, "arrow_downward")):
            st.button(label, key=f"unit_{label}", icon=f":material/{icon}:", on_click=_go, args=(views.neighbour(study, metric, unit, step),),
                      help="The next unit by rank")  # fmt: skip
        st.button("Select", key="unit_select", icon=":material/select:", on_click=state.select, args=(Selection((unit,)),),
                  help="Then it can be pinned on the Map and the Fit page.")  # fmt: skip
        st.markdown(metric_agreement.trust_badge(metric, get_trust(study.index.digest)))
    return metric, unit


def _go(name: str) -> None:
    st.session_state["unit"] = name


def _everything(study: Study, view: views.UnitView) -> None:
    frame = pd.DataFrame(dict(view.values))
    st.dataframe(
        frame, hide_index=True, height=330, key="unit_values",
        column_config={"value": st.column_config.NumberColumn(format="%.3e"), "stderr": st.column_config.NumberColumn("±", format="%.1e"),
                       "rank": st.column_config.NumberColumn(help="1 = the largest of all units")},
    )  # fmt: skip
    downloads("unit", lambda: frame, lambda: {"unit": view.key, "title": view.title, "values": dict(view.values)}, "unit")  # fmt: skip


def _evidence(study: Study, view: views.UnitView) -> None:
    """Histograms and spectrum; the matrix is read from the checkpoint when asked for."""
    if not st.toggle(
        "Histograms of weights and inputs, eigenvalue spectrum",
        key="weights",
        bind="query-params",
        help="Reads this one matrix from the checkpoint; the inputs were seen by a metric.",
    ):
        cli_twin(command("measure", study.index.path, metric="spectral"))
        return
    left, middle, right = st.columns(3, gap="large")
    with middle:
        _inputs(study, view)
    try:
        found = _weight(study.index.digest, view.unit, study)
    except UserError as e:
        with left:
            error_box(e)
        return
    with left:
        st.caption(
            f"{found.outliers:.2%} of the weights lie beyond six standard deviations; excess kurtosis {found.kurtosis:.1f}"
        )
        st.plotly_chart(charts.histogram(found, current_palette()), key="weight_histogram", theme=None, config=_CONFIG, alt="Histogram of the weights")  # fmt: skip
    with right:
        st.caption(
            f"{found.tail} of {len(found.eigenvalues)} eigenvalues in the tail; below 2 is called over-trained, above 6 under-trained"
        )
        st.plotly_chart(charts.spectrum(found, current_palette()), key="spectrum", theme=None, config=_CONFIG, alt="Eigenvalues with the power-law fit")  # fmt: skip


def _inputs(study: Study, view: views.UnitView) -> None:
    """Histogram of the unit's inputs, or how to get one."""
    try:
        found = evidence.input_evidence(study, view.unit)
    except UserError as e:
        error_box(e)
        return
    if found is None:
        st.caption("A histogram of this unit's inputs stands here once they have been watched:")
        cli_twin(command("measure", study.index.path, metric=unit_inputs.METRIC, calibration="TEXT"))
        return
    st.caption(found.words)
    if found.total:
        st.plotly_chart(charts.input_histogram(found, current_palette()), key="input_histogram", theme=None, config=_CONFIG, alt=found.words)  # fmt: skip
        downloads("unit-inputs", lambda: pd.DataFrame(found.columns()), lambda: {"unit": view.key, **found.to_dict()}, "inputs")  # fmt: skip


@st.cache_data(
    max_entries=32, show_spinner="Reading the weight", hash_funcs={Study: lambda s: s.index.digest}
)
def _weight(digest: str, unit: int, study: Study) -> views.Evidence:
    return evidence.weight_evidence(study.index, unit)
