"""Map: where in the model does it hurt?"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import NO_FORMAT, UserError
from bitatlas.app import state
from bitatlas.app.charts import sensitivity_map as chart
from bitatlas.app.studies import Study
from bitatlas.app.views import sensitivity_map as views
from bitatlas.app.views import unit_table
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.picking import picked
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.tables:
        title("No damage has been measured yet")
        empty_state("The map shows how much every layer and expert is hurt by fewer bits, once it is measured.",
                    "Measure a model", screen="run")  # fmt: skip
        return
    head = st.container()
    controls = _controls(study)
    view = views.build(study, controls)
    with head:
        title(view.title, view.subtitle)
    _chart(study, view, controls)
    _search(study)
    _selected(study, view, controls)


def _controls(study: Study) -> views.MapControls:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        metric = st.selectbox("Metric", list(study.tables), key="metric", bind="query-params", width=200)
        formats = study.tables[metric].formats
        chosen, normalise, projection, ordered = NO_FORMAT, "as measured", views.ALL, False
        if formats != (NO_FORMAT,):
            start = next((f for f in formats if f.startswith("int3")), formats[0])
            chosen = start
            if len(formats) > 1:
                chosen = st.select_slider(
                    "Format", formats, start, key="format", bind="query-params", width=250
                )
            normalise = st.selectbox(
                "Show", list(views.NORMALISE), key="show", bind="query-params", width=150
            )
        names = views.projections(study)
        if names:
            projection = st.segmented_control(
                "Expert projection", names, default=views.ALL, required=True, key="projection", bind="query-params"
            ) or views.ALL  # fmt: skip
            ordered = st.toggle("Worst experts first", key="sorted", bind="query-params")
    return views.MapControls(metric, chosen, projection, normalise, ordered)


def _chart(study: Study, view: views.MapView, controls: views.MapControls) -> None:
    # The figure shows the selection of the last epoch; what is boxed since then the browser shows by itself.
    epoch = state.selection_epoch()
    if st.session_state.get("_map_epoch") != (epoch, study.index.digest):
        st.session_state["_map_epoch"] = (epoch, study.index.digest)
        st.session_state["_map_shown"] = state.selection()
    shown = st.session_state["_map_shown"]
    cells = view.cells_of(shown) if len(shown) else None
    fig = chart.figure(view, current_palette(), study.keys, cells)
    key = "map_chart"

    def chosen() -> None:
        state.select(view.units_of(picked(key)), from_chart=True)

    name = f"{study.index.name}-{controls.metric}-{controls.format}"
    st.plotly_chart(
        fig, key=key, on_select=chosen, selection_mode=("points", "box", "lasso"), theme=None, height=chart.HEIGHT,
        config={"displaylogo": False, "toImageButtonOptions": {"filename": name, "scale": 2}},
        alt=f"{view.title}. {view.subtitle}",
    )  # fmt: skip


def _search(study: Study) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        pattern = st.text_input("Search units by name (regular expression)", key="search", bind="query-params",
                                placeholder=r"layers\.(0|29)\..*down", width=420)  # fmt: skip
        if not pattern:
            return
        try:
            found = views.search(study, pattern)
        except UserError as e:
            error_box(e)
            return
        st.button(f"Select {len(found):,} matches", on_click=state.select, args=(found,), disabled=not len(found), key="select_matches")  # fmt: skip


def _selected(study: Study, view: views.MapView, controls: views.MapControls) -> None:
    table = unit_table.build(study, view, controls, state.selection(), state.pins())
    st.markdown(f"#### {table.title}")
    frame = pd.DataFrame(dict(table.columns))
    st.dataframe(frame, hide_index=True, height=300)
    line = command("measure", study.index.path, metric=controls.metric, formats=controls.format)
    cli_twin(line)
    downloads("units", lambda: frame, lambda: {"title": view.title}, "map")
