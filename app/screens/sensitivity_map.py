"""Map: where in the model does it hurt?"""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import FORMATS, NO_FORMAT, UserError
from bitatlas.app import state
from bitatlas.app.charts import sensitivity_map as chart
from bitatlas.app.studies import Study
from bitatlas.app.views import sensitivity_map as views
from bitatlas.app.views import unit_table
from bitatlas.app.views.fit_controls import preferred
from bitatlas.app.views.metric_agreement import trust_badge, trust_line
from bitatlas.app.views.words import count
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import get_trust, the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.kept import kept
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.picking import drawn, picked
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]

_ROWS = 200  # drawn at once; the downloads hold them all


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
    view = kept(study, "map", controls, make=lambda: views.build(study, controls))
    with head:
        title(view.title, view.subtitle)
    _chart(study, view, controls)
    _tools(study, controls)
    _units(study, view, controls)


def _controls(study: Study) -> views.MapControls:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        metrics = list(study.tables)
        metric = st.selectbox(
            "Metric", metrics, index=preferred(metrics), key="metric", bind="query-params", width=185
        )
        formats = study.tables[metric].formats
        chosen, normalise, projection, ordered = NO_FORMAT, "as measured", views.ALL, False
        if formats != (NO_FORMAT,):
            start = next((f for f in formats if f.startswith("int3")), formats[0])
            chosen = start
            if len(formats) > 1:
                chosen = st.select_slider(
                    "Format", formats, start, key="format", bind="query-params", width=215
                )
            normalise = st.selectbox(
                "Show", list(views.NORMALISE), key="show", bind="query-params", width=145
            )
        names = views.projections(study)
        if names:
            projection = st.segmented_control(
                "Expert projection", names, default=views.ALL, required=True, key="projection", bind="query-params"
            ) or views.ALL  # fmt: skip
            ordered = st.toggle(
                "Worst first",
                key="sorted",
                bind="query-params",
                help="Sort the experts of each layer by damage",
            )
        st.markdown(
            trust_badge(metric, get_trust(study.index.digest)),
            help=trust_line(metric, get_trust(study.index.digest)),
        )
        st.segmented_control("Select by", chart.PICKS, default="box", required=True, key="pick", bind="query-params",
                             help="Shift adds to the selection. A double click clears it.")  # fmt: skip
    return views.MapControls(metric, chosen, projection, normalise, ordered)


def _chart(study: Study, view: views.MapView, controls: views.MapControls) -> None:
    pick = st.session_state.get("pick") or "box"
    shown = state.shown_selection("map", (study.index.digest, controls, pick))
    cells = view.cells_of(shown) if len(shown) else None
    look = current_palette()
    fig = kept(
        study,
        "map_chart",
        controls,
        pick,
        look.dark,
        shown.ids,
        make=lambda: chart.figure(view, look, study.keys, cells, pick),
    )
    key = "map_chart"

    def chosen() -> None:
        found = picked(key) if pick == "click" else view.cells_in(drawn(key))
        state.select(view.units_of(found), from_chart=True)

    name = f"{study.index.name}-{controls.metric}-{controls.format}"
    st.plotly_chart(
        fig, key=key, on_select=chosen, selection_mode=("points", "box", "lasso"), theme=None, height=chart.HEIGHT,
        config={"displaylogo": False, "toImageButtonOptions": {"filename": name, "scale": 2}},
        alt=f"{view.title}. {view.subtitle}",
    )  # fmt: skip


def _tools(study: Study, controls: views.MapControls) -> None:
    """Search on the left; what to do with the selection on the right."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="map_tools"):
        pattern = st.text_input("Search by name (regular expression)", key="search", bind="query-params",
                                placeholder=r"layers\.(0|29)\..*down", width=290)  # fmt: skip
        found, problem = None, None
        if pattern:
            try:
                found = views.search(study, pattern)
                st.button(f"Select {count(len(found), 'match', 'es')}", on_click=state.select, args=(found,),
                          disabled=not len(found), key="select_matches")  # fmt: skip
            except UserError as e:
                problem = e
        st.space("stretch")
        nothing = not len(state.selection())
        formats = [f for f in study.tables[controls.metric].formats if f != NO_FORMAT] or list(FORMATS)
        st.selectbox("Pin the selection to", [*formats, "bf16"], index=len(formats) - 1, key="pin_format", width=170)  # fmt: skip
        st.button("Pin", key="pin", icon=":material/keep:", on_click=_pin, disabled=nothing,
                  shortcut="P", help="The Fit page keeps pinned units at their format.")  # fmt: skip
        st.button(
            "Free", key="free", icon=":material/keep_off:", on_click=state.free_selection, disabled=nothing
        )
        edits = state.edits()
        st.button("", key="undo", icon=":material/undo:", on_click=state.undo, disabled=not edits.can_undo,
                  shortcut="Ctrl+Z", help="Take the last pin back")  # fmt: skip
        st.button("", key="redo", icon=":material/redo:", on_click=state.redo, disabled=not edits.can_redo,
                  shortcut="Ctrl+Shift+Z", help="Pin again")  # fmt: skip
    if problem:
        error_box(problem)


def _pin() -> None:
    state.pin_selection(st.session_state["pin_format"])


def _units(study: Study, view: views.MapView, controls: views.MapControls) -> None:
    # A download is made when its button is pressed, outside the session: what it needs is taken along now.
    chosen, pins = state.selection(), state.pins()

    def whole() -> unit_table.UnitTable:
        return unit_table.build(study, view, controls, chosen, pins)

    table = unit_table.build(study, view, controls, chosen, pins, _ROWS)
    frame = pd.DataFrame(dict(table.columns))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"#### {table.title}")
        downloads(f"{study.index.name}-units", lambda: pd.DataFrame(dict(whole().columns)),
                  lambda: _data(study, view, controls, whole()), "map")  # fmt: skip
    number = st.column_config.NumberColumn
    st.dataframe(
        frame, hide_index=True, height=min(38 + 35 * len(frame), 360), key="unit_table", alt=table.title,
        column_config={
            "unit": st.column_config.TextColumn("Unit", width="large", pinned=True),
            "expert": number("expert", help="empty for units that are no experts"),
            "value": number(view.unit, format="%.3e", width="medium"),
            "stderr": number("± (standard error)", format="%.1e"),
            "bytes": number("bytes", format="localized"),
        },
    )  # fmt: skip
    cli_twin(_line(study, controls))


def _line(study: Study, controls: views.MapControls) -> str:
    """The measurement that this map shows, as a command."""
    formats = [f for f in study.tables[controls.metric].formats if f != NO_FORMAT]
    run = study.runs.get(controls.metric)
    settings = {k: run.provenance.get(k) or None for k in ("tokens", "seed")} if run else {}
    metric = run.metric if run else controls.metric
    return command("measure", study.index.path, metric=metric, formats=",".join(formats), **settings)


def _data(study: Study, view: views.MapView, controls: views.MapControls, table: unit_table.UnitTable) -> dict[str, object]:  # fmt: skip
    """The view as JSON: what it says, what it was asked, the units in it."""
    return {
        "title": view.title, "subtitle": view.subtitle, "unit": view.unit, "floor": view.floor,
        "model": study.index.name, "model_digest": study.index.digest, "run": study.tables[controls.metric].run,
        "controls": asdict(controls),
        "units": {name: pd.Series(column).tolist() for name, column in table.columns.items()},
    }  # fmt: skip
