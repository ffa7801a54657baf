"""Library: which models and studies there are, how complete, how fresh."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import state, studies
from bitatlas.app.views import inside
from bitatlas.app.views import library as views
from bitatlas.app.widgets.boxes import empty_state, error_box, link_to
from bitatlas.app.widgets.data import forget, get_freshness, get_studies, get_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]

_PROBLEM = "_library_problem"


def page() -> None:
    """Draw the page."""
    infos = get_studies()
    view = views.build(infos, get_freshness())
    title(view.title, view.subtitle)
    if not infos:
        empty_state("Models and what was measured on them will stand here. A finished study of a small mixture of experts comes with bitatlas.",
                    "Open the sample study", on_click=_open_sample)  # fmt: skip
    else:
        info = _table(view, infos)
        _add_model()
        _inside(info)
        return
    _add_model()


def _table(view: views.LibraryView, infos: list[studies.StudyInfo]) -> studies.StudyInfo:
    frame = pd.DataFrame(dict(view.columns))
    st.dataframe(
        frame, hide_index=True, key="library_table", on_select=lambda: _pick(infos), selection_mode="single-row",
        alt=view.title,
        column_config={
            "model": st.column_config.TextColumn("Model", pinned=True),
            "architecture": st.column_config.TextColumn("Architecture"),
            "weights": st.column_config.TextColumn("Weights", alignment="right"),
            "units": st.column_config.NumberColumn("Units", format="localized"),
            "experts": st.column_config.TextColumn("Experts a layer", alignment="right"),
            "coverage": st.column_config.ProgressColumn("Coverage", format="percent", min_value=0, max_value=1,
                                                        help="Share of unit and format pairs measured by the best-covered metric"),
            "metrics": st.column_config.ListColumn("Metrics", width="medium"),
            "allocations": st.column_config.NumberColumn("Allocations"),
            "verified": st.column_config.NumberColumn("Verified"),
            "freshness": st.column_config.TextColumn("On disk"),
            "path": st.column_config.TextColumn("Path"),
        },
    )  # fmt: skip
    info = next((s for s in infos if s.digest == st.session_state.get("_study")), infos[0])
    with st.container(horizontal=True, vertical_alignment="center"):
        link_to("sensitivity_map", f"Open the map of {info.name}", ":material/grid_on:", primary=True)
        link_to("run", "Measure it", ":material/play_circle:")
        st.button("Open the sample study", key="sample", on_click=_open_sample, type="tertiary")
        st.space("stretch")
        downloads("library", lambda: frame, lambda: {"title": view.title, **view.columns}, "library")
    return info


def _pick(infos: list[studies.StudyInfo]) -> None:
    rows = st.session_state["library_table"]["selection"]["rows"]
    if rows and rows[0] < len(infos):
        state.choose_study(infos[rows[0]].label)


def _inside(info: studies.StudyInfo) -> None:
    view = inside.build(get_study(info.digest).index)
    st.markdown(f"#### {view.title}")
    st.caption(view.subtitle)
    size = {name: st.column_config.TextColumn(name, alignment="right") for name in (*inside.SHOWN, "weights")}
    share = st.column_config.ProgressColumn(
        "share of the weights", format="percent", min_value=0, max_value=1
    )
    st.dataframe(pd.DataFrame(view.columns), hide_index=True, key="inside", height="content", alt=view.title,
                 column_config={"share": share, **size})  # fmt: skip
    cli_twin(command("scan", info.path))


def _add_model() -> None:
    with st.form("add_model", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Add a model: checkpoint folder or .gguf file on this machine", placeholder="models/smollm2", width=520, key="new_model",
            help="Only the headers are read. Folders outside $BITATLAS_MODEL_ROOTS are refused here; the command line takes any path.",
        )  # fmt: skip
        st.form_submit_button("Add", icon=":material/add:", on_click=_add)
    problem = st.session_state.pop(_PROBLEM, None)
    if problem:
        error_box(problem)


def _add() -> None:
    from bitatlas.app import tasks

    path = st.session_state["new_model"] or ""
    try:
        if not path.strip():
            raise UserError("no folder was named", fix="name a checkpoint folder such as models/smollm2")
        index = tasks.register(tasks.confine(path.strip()))
        _choose(index.digest)
        st.toast(f"{index.name}: {len(index.units):,} units", icon=":material/check:")
    except UserError as e:
        st.session_state[_PROBLEM] = e


def _open_sample() -> None:
    from bitatlas.app import tasks

    try:
        _choose(tasks.demo()["digest"])
    except UserError as e:
        st.session_state[_PROBLEM] = e


def _choose(digest: str) -> None:
    forget()
    label = next((s.label for s in get_studies() if s.digest == digest), None)
    if label:
        state.choose_study(label)
