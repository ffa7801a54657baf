"""Compare: what changes when one allocation becomes another?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app import state
from bitatlas.app.charts import compare as charts
from bitatlas.app.studies import Study, open_store
from bitatlas.app.tasks.stability import stability
from bitatlas.app.views import compare as views
from bitatlas.app.views.fit_controls import preferred
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command, downloads
from bitatlas.cache.plans import allocation_id

__all__ = ["page"]

NOW, FREE = "Fit, as asked now", "Fit, without the pins"


def page() -> None:
    """Draw the page."""
    study = the_study()
    asked = state.question()
    names = [] if study is None else _names(study)
    if study is None or len(names) < 2:
        title("There are no two allocations to compare yet")
        empty_state(
            "Compare shows where two allocations spend their bits differently, and what that costs.",
            "Make an allocation",
            screen="fit",
        )
        return
    head = st.container()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        a = st.selectbox(
            "A",
            names,
            index=names.index(FREE) if FREE in names else _rival(study),
            key="compare_a",
            bind="query-params",
        )
        b = st.selectbox("B", names, index=0, key="compare_b", bind="query-params")
        metrics = list(study.damage_metrics)
        start = metrics.index(asked.metric) if asked and asked.metric in metrics else preferred(metrics)
        metric = (
            st.selectbox("Damage by", metrics, index=start, key="compare_metric", bind="query-params")
            if metrics
            else None
        )
        edits = state.edits()
        st.button("Undo the last pin", icon=":material/undo:", on_click=state.undo, disabled=not edits.can_undo, key="compare_undo",
                  shortcut="Ctrl+Z")  # fmt: skip
    try:
        table = study.tables[metric] if metric else None
        sides = _side(study, a), _side(study, b)
        one, other = (side for side, _ in sides)
        view = views.build_compare(
            study.index, one, other, table, fit_cache.unit_of(metric) if metric else "", _stability(study, sides[0][1])
        )  # fmt: skip
    except UserError as error:
        with head:
            title("These cannot be compared")
        error_box(error)
        return
    with head:
        title(view.title, view.detail)
    _draw(view)
    cli_twin(command("compare", study.index.path, "A.json", "B.json", metric=metric))


def _names(study: Study) -> list[str]:
    asked = state.question()
    live = [NOW, FREE] if asked and asked.metric in study.tables else []
    return live + list(_stored(study))


def _rival(study: Study) -> int:
    found = {
        v["allocation"]: float(v["kl_mean"]) for v in reversed(study.verifications)
    }  # the newest of each last
    plans = study.allocations
    return views.rival([p.weights_bytes for p in plans], [found.get(p.id, float("nan")) for p in plans])


def _stored(study: Study) -> dict[str, str]:
    """Label -> id."""
    return {a.label: a.id for a in study.allocations}


def _side(study: Study, name: str) -> tuple[views.Side, Allocation]:
    asked = state.question()
    if name in (NOW, FREE) and asked is not None:
        pins = {} if name == FREE else {study.keys[i]: f for i, f in state.pins().items()}
        plan = fit_cache.answer(study, asked, pins)
        return views.Side(name, plan.formats), plan
    id = _stored(study)[name]
    found = next((v for v in study.verifications if v["allocation"] == id), None)
    kl = (float(found["kl_mean"]), float(found.get("kl_stderr") or 0.0)) if found else (float("nan"),) * 2
    plan = open_store().allocation(id)
    return views.Side(name, plan.formats, *kl), plan


@st.cache_data(max_entries=32, show_spinner="Solving again on resampled damages")
def _solved_again(key: str, _study: Study, _plan: Allocation) -> views.Stability:
    return stability(open_store(), _study.index, _plan)


def _stability(study: Study, plan: Allocation) -> views.Stability:
    return _solved_again(allocation_id(plan), study, plan)


def _draw(view: views.CompareView) -> None:
    palette = current_palette()
    left, right = st.columns([1.3, 1], gap="large")
    plain = {"displayModeBar": False}
    with left:
        st.markdown("**Where the bits go**")
        st.plotly_chart(
            charts.change_map(view, palette), key="change_map", theme=None, config=plain, alt=view.title
        )
    with right:
        st.markdown("**Bytes, from A to B**")
        st.plotly_chart(
            charts.waterfall(view, palette, "bytes"),
            key="bytes_waterfall",
            theme=None,
            config=plain,
            alt=view.title,
        )
        if np.isfinite(view.damage).all():
            st.markdown("**Predicted damage, from A to B**")
            st.plotly_chart(charts.waterfall(view, palette, "damage"), key="damage_waterfall", theme=None, config=plain,
                            alt=view.detail)  # fmt: skip
    frame = pd.DataFrame(
        [{"unit": u.unit, "layer": u.layer, "role": u.role, "A": u.before, "B": u.after, "bytes": u.nbytes,
          "damage": u.damage, "A again": u.kept} for u in view.units]
    )  # fmt: skip
    if len(frame):
        st.dataframe(frame, hide_index=True, column_config={
            "damage": st.column_config.NumberColumn("damage, B − A", format="%+.3g"),
            "bytes": st.column_config.NumberColumn("bytes, B − A", format="%+d"),
            "A again": st.column_config.NumberColumn(format="percent", help=view.stable_how or None)})  # fmt: skip
        downloads("compare", lambda: frame, view.to_dict, "compare")
