"""Fit: what is the best model that fits in N GiB?"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import state
from bitatlas.app.charts import fit as charts
from bitatlas.app.charts.memory_bar import memory_bar
from bitatlas.app.sizes import format_bytes
from bitatlas.app.studies import Study
from bitatlas.app.views import fit as views
from bitatlas.app.views import fit_controls as controls
from bitatlas.app.views import metric_agreement as views_of_trust
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import get_trust, the_study
from bitatlas.app.widgets.frame import show_budget, title
from bitatlas.app.widgets.kv_controls import kv_controls
from bitatlas.app.widgets.limit_controls import limit_controls
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, downloads

__all__ = ["page"]


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.damage_metrics:
        title("Nothing to fit yet")
        empty_state(
            "Fit spends a memory budget where it hurts least; it needs one measured metric.",
            "Measure a model",
            screen="run",
        )
        return
    head = st.container()
    left, right = st.columns([1, 2.6], gap="large")
    with left:
        asked = _controls(study)
    with right:
        _answer(study, asked, head)


def _controls(study: Study) -> controls.Asked:
    """The question: memory, context, formats, metric."""
    bounds = controls.bounds(study.index)
    metric = st.selectbox(
        "Metric",
        study.damage_metrics,
        index=controls.preferred(study.damage_metrics),
        key="fit_metric",
        bind="query-params",
    )
    trust = get_trust(study.index.digest)
    st.markdown(views_of_trust.trust_badge(metric, trust), help=views_of_trust.trust_line(metric, trust))
    measured = study.tables[metric].formats
    formats = st.multiselect(
        "Allowed formats", measured, default=controls.usual(measured), key="fit_formats", bind="query-params"
    )
    memory = st.slider(
        f"Memory ({bounds.word})", bounds.low, bounds.high, bounds.start, step=bounds.step, key="memory", bind="query-params",
        help="For weights, KV cache and reserve together.",
    )  # fmt: skip
    with st.container(horizontal=True):
        context = st.number_input("Context (tokens)", 0, 1 << 20, 0 if study.index.kv is None else bounds.context, step=512, key="context",
                                  bind="query-params", disabled=study.index.kv is None)  # fmt: skip
        batch = st.number_input("Batch", 1, 1024, 1, key="batch", bind="query-params")
    reserve = st.number_input(f"Reserve ({bounds.word})", 0.0, bounds.high, bounds.reserve, step=bounds.step, key="reserve", bind="query-params",
                              help="Activations, workspace, the runtime itself.")  # fmt: skip
    asked = controls.Asked(
        metric,
        tuple(formats),
        int(memory * bounds.scale),
        int(context),
        int(batch),
        "16/16",
        int(reserve * bounds.scale),
    )
    asked = kv_controls(study, limit_controls(study, asked))
    _pins(study)
    return asked


def _pins(study: Study) -> None:
    """Pins made here and on the Map, with undo."""
    options = list(controls.PIN_FORMATS)
    chosen = state.selection()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        wanted = st.selectbox(
            "Pin the selection to", options, index=options.index("int8-g64"), key="pin_format"
        )
        st.button("Pin", icon=":material/push_pin:", on_click=state.pin_selection, args=(wanted,), disabled=not len(chosen), shortcut="P",
                  help="Select units on the Map first.")  # fmt: skip
    edits = state.edits()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"{len(state.pins())} pinned, {len(chosen)} selected")
        st.button(
            "Undo",
            icon=":material/undo:",
            on_click=state.undo,
            disabled=not edits.can_undo,
            shortcut="Ctrl+Z",
            type="tertiary",
        )
        st.button(
            "Redo",
            icon=":material/redo:",
            on_click=state.redo,
            disabled=not edits.can_redo,
            shortcut="Ctrl+Shift+Z",
            type="tertiary",
        )
        st.button(
            "Free the selection",
            on_click=state.free_selection,
            disabled=not len(chosen) or not state.pins(),
            type="tertiary",
        )


def _answer(study: Study, asked: controls.Asked, head: st.delta_generator.DeltaGenerator) -> None:
    palette = current_palette()
    state.set_question(asked)
    try:
        if not asked.formats:
            raise UserError("no format is allowed", fix="allow at least one")
        pins = {study.keys[i]: f for i, f in state.pins().items()}
        problem, cache = fit_cache.front(study, asked.metric, asked.formats, pins, asked.rules, asked.target)
        budget = asked.budget(study.index, problem.min_bytes + problem.kept_bytes)
        line = views.front_line(cache, problem.kept_bytes)
    except UserError as error:
        with head:
            title("This cannot be solved")
        error_box(error)
        return
    unit = fit_cache.unit_of(asked.metric)
    view, problem_with_it = None, None
    try:
        view = views.build_fit(
            study.index,
            problem,
            cache,
            views.FitControls(
                asked.total_bytes, budget, asked.metric, unit, study.tables[asked.metric].formats
            ),
        )
    except UserError as error:
        problem_with_it = error
    with head:
        if view is None:
            title(f"{format_bytes(asked.total_bytes)} is not enough")
        else:
            title(
                view.title,
                f"{view.detail} {view.bits_per_weight:.2f} effective bits per weight; {view.gap:.1%} above the lower bound.",
            )
    if problem_with_it is not None:
        error_box(problem_with_it)
    if view is not None:
        state.set_budget(asked.total_bytes - _free(view), asked.total_bytes)
        show_budget()
        with st.container(key="memory_bar"):
            st.html(memory_bar(view, palette))
    measured = views.measured_points(study.verifications, fit_cache.sizes(study))
    st.plotly_chart(charts.front_chart(view, line, measured, budget.weights_bytes, palette, asked.metric, unit), key="front_chart", theme=None,
                    config={"displayModeBar": False}, alt="Predicted damage over size, with the budget as a line")  # fmt: skip
    if view is not None:
        _take_away(study, asked, view, pins)


def _free(view: views.FitView) -> int:
    return next((s.nbytes for s in view.segments if s.kind == "free"), 0)


def _take_away(study: Study, asked: controls.Asked, view: views.FitView, pins: dict[str, str]) -> None:
    """The allocation as a file, kept in the study, and the same from the shell."""

    def text() -> str:
        return fit_cache.answer(study, asked, pins).to_json()

    shares = pd.DataFrame([{"format": s.format, "units": s.units, "weights": s.params, "bytes": s.nbytes, "predicted damage": s.damage}
                           for s in view.shares])  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button("Allocation", text, f"{study.index.name}-{view.bits_per_weight:.2f}bpw.json", "application/json",
                           icon=":material/download:", type="primary", on_click="ignore", key="download_allocation")  # fmt: skip
        st.button("Keep in the study", icon=":material/bookmark:", on_click=fit_cache.keep, args=(study, asked, pins), key="keep_allocation",
                  help="Then Verify and Export can use it.")  # fmt: skip
    st.dataframe(shares, hide_index=True)
    cli_twin(controls.twin(study.index.path, asked, pins))
    downloads("fit", lambda: shares, view.to_dict, "fit")
