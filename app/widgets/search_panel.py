"""Searches on the real model, from the Allocators page: one is begun for Fit's question, and those that run are followed."""

from __future__ import annotations

import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import state
from bitatlas.app.charts import search_front as charts
from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.studies import Study
from bitatlas.app.views.fit_controls import Asked, pin_rules
from bitatlas.app.views.search_front import build_search_front
from bitatlas.app.widgets.boxes import error_box, link_to
from bitatlas.app.widgets.jobs import follow, jobs_now
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command
from bitatlas.solvers import SEARCHERS

__all__ = ["search_panel"]

_PROBLEM = "_search_problem"
_OPEN = tuple(name for name in SEARCHERS if name != "refine")  # which begins from an allocation


def search_panel(study: Study) -> None:
    """The form, and under it every search of this model that has not ended well; looks again every two seconds while one runs."""
    with st.expander("Search on the real model", icon=":material/travel_explore:"):
        _form(study)
    st.fragment(_running, run_every=follow())(study)


def _form(study: Study) -> None:
    from bitatlas.app import tasks

    asked = state.question()
    if asked is None or asked.metric not in study.tables:
        st.caption(
            "A search answers the question of the Fit page: its memory, formats, pins, engine and limits on groups."
        )
        link_to("fit", "Ask on the Fit page", ":material/tune:")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        solver = st.selectbox("Search", _OPEN, key="search", bind="query-params", width=180)
        tokens = int(st.number_input("Text, tokens", 1024, 1 << 24, 65536, 1024, key="search_tokens", bind="query-params", width=150,
                                     help="Minibatches are drawn from it."))  # fmt: skip
        steps = int(
            st.number_input(
                "Steps",
                0,
                100_000,
                int(SEARCHERS[solver].SETTINGS["steps"]),
                1,
                key=f"search_steps_{solver}",
                width=110,
            )
        )
        seed = int(
            st.number_input("Seed", 0, 2**31 - 1, 0, key="search_seed", bind="query-params", width=110)
        )
    text = st.text_input("Calibration text", key="search_text", bind="query-params", placeholder="a text or JSONL file on this machine",
                         help="The demo model brings its own text; leave empty then.")  # fmt: skip
    most = tasks.search_tokens(solver, tokens=tokens, steps=steps)
    told = (
        f"at most {most:,} forward-equivalent tokens"
        if most is not None
        else "its tokens cannot be told beforehand"
    )
    limits = f" Every candidate keeps to {', '.join(asked.rules.limits)}." if asked.rules else ""
    st.caption(f"{SEARCHERS[solver].TITLE}: {told}.{limits}")
    pins = {study.keys[i]: f for i, f in state.pins().items()}
    st.button("Search", type="primary", key="start_search", icon=":material/play_arrow:", on_click=_submit,
              args=(study, asked, pins, solver, tokens, steps, seed, text))  # fmt: skip
    problem = st.session_state.pop(_PROBLEM, None)
    if problem:
        error_box(problem)
    groups = {"expert_groups": asked.groups, "group_limit": list(asked.rules.limits)} if asked.rules else {}
    kv = {"context": asked.context, "batch": asked.batch, "kv_plan": asked.kv} if asked.context else {}
    cli_twin(command("search", study.index.path, solver=solver, metric=asked.metric, fit=asked.total_bytes, **kv, reserve=asked.reserve_bytes,
                     formats=",".join(asked.formats), target=asked.target, tokens=tokens, generations=steps, seed=seed, calibration=text,
                     pin=pin_rules(pins), **groups, output="allocation.json"))  # fmt: skip


def _submit(
    study: Study,
    asked: Asked,
    pins: dict[str, str],
    solver: str,
    tokens: int,
    steps: int,
    seed: int,
    text: str,
) -> None:
    """In a callback: a rerun cannot start a second job, and the same request is the same job anyway."""
    from bitatlas.app import tasks

    try:
        job = tasks.submit_search(
            study.index.path, solver=solver, metric=asked.metric, fit=asked.total_bytes, context=asked.context, batch=asked.batch,
            kv_plan=asked.kv if asked.context else "", reserve=asked.reserve_bytes, formats=asked.formats, pins=pins,
            target=asked.target or None, calibration=tasks.confine(text) if text else None, tokens=tokens, steps=steps, seed=seed,
            experts=asked.rules,
        )  # fmt: skip
        state.set_job(job)
    except UserError as e:
        st.session_state[_PROBLEM] = e


def _running(study: Study) -> None:
    from bitatlas.app import tasks

    for job in _unfinished(study.index.digest):
        view = build_search_front(
            tasks.search_candidates(job.id),
            study.index.kept_bytes,
            SEARCHERS[job.params["solver"]].TITLE,
            job.state,
        )
        if view is None:
            st.caption(f"{job.title}: {job.state}; nothing scored yet")
        else:
            st.markdown(f"**{view.title}.** {view.detail}")
            st.plotly_chart(
                charts.figure(view, current_palette()),
                key=f"search_{job.id}",
                theme=None,
                config={"displayModeBar": False},
                alt=view.title,
            )
        link_to("run", "Follow it on the Run page", ":material/monitoring:")


def _unfinished(digest: str) -> list[JobStatus]:
    """Searches of a model that run, wait, were cancelled or failed; what is done has a stored front, drawn with the others."""
    return [
        j for j in jobs_now() if j.kind == "search" and j.params.get("digest") == digest and j.state != "done"
    ]
