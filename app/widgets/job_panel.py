"""One job closely: progress by layer, time left, log, cancel and resume; and the list of all jobs."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import ModelIndex, UserError
from bitatlas.app import state, studies
from bitatlas.app.charts import progress as chart
from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.views.job import JobView, by_layer, job_view
from bitatlas.app.widgets.boxes import error_box, link_to
from bitatlas.app.widgets.jobs import follow, jobs_now, model_name
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command

__all__ = ["job_panel"]

_PROBLEM = "_job_problem"


def job_panel(index: ModelIndex) -> None:
    """The panel; looks again every two seconds while something runs."""
    st.fragment(_panel, run_every=follow())(index)


def _panel(index: ModelIndex) -> None:
    jobs = jobs_now()
    if not jobs:
        st.markdown("#### No job yet")
        st.caption("Progress by layer, time left and the log of a job will stand here. A job goes on when this page is closed.")  # fmt: skip
        return
    chosen = next((j for j in jobs if j.id == state.job()), jobs[0])
    view = job_view(chosen, model_name(chosen))
    st.markdown(f"#### {view.name} &nbsp; :{view.colour}-badge[{view.state}]")
    st.progress(view.fraction, text=view.line)
    if view.alive and view.active:
        st.caption(f"{view.steps} · {view.alive} · job {view.id}")
    _layers(chosen, view, index)
    with st.container(horizontal=True):
        if view.state == "done" and chosen.kind == "measure":
            link_to("sensitivity_map", "Open the map", ":material/grid_on:", primary=True)
        if view.can_cancel:
            st.button(
                "Cancel",
                key="cancel_job",
                icon=":material/stop_circle:",
                on_click=_do,
                args=("cancel", view.id),
            )
        if view.can_resume:
            st.button(
                "Resume", key="resume_job", icon=":material/resume:", on_click=_do, args=("resume", view.id)
            )
    problem = st.session_state.pop(_PROBLEM, None)
    if problem:
        error_box(problem)
    with st.expander("Log", expanded=view.state == "failed"):
        st.code(_log(view.id) or "nothing written yet", language=None, height=220)
        cli_twin(command("jobs", "logs", view.id))
    if len(jobs) > 1:
        _list(jobs, [job_view(j, model_name(j)) for j in jobs])


def _layers(job: JobStatus, shown: JobView, index: ModelIndex) -> None:
    if job.kind != "measure" or job.params.get("digest") not in (None, index.digest) or job.state == "done":
        return
    store = studies.open_store()
    wanted = set(job.params.get("metrics", []))
    since = (job.created or 0.0) - 1.0
    steps: dict[str, list[str]] = {}
    for run in store.runs(index.digest):
        if (
            run.metric in wanted
            and run.metric not in steps
            and (run.finished is None or run.finished >= since)
        ):
            steps[run.metric] = [k for k in store.steps_done(run.run) if k.startswith(f"{run.metric}/")]
    if not steps:
        return
    view = by_layer(index.n_layers, steps, shown.fraction)
    st.plotly_chart(
        chart.figure(view, current_palette()), key="job_layers", theme=None, alt=view.title, config={"displayModeBar": False}
    )  # fmt: skip


def _list(jobs: list[JobStatus], views: list[JobView]) -> None:
    frame = pd.DataFrame({"job": [v.name for v in views], "state": [v.state for v in views],
                          "done": [v.fraction for v in views], "what": [v.line for v in views], "id": [v.id for v in views]})  # fmt: skip

    def choose() -> None:
        rows = st.session_state["job_list"]["selection"]["rows"]
        if rows and rows[0] < len(jobs):
            state.set_job(jobs[rows[0]].id)

    st.dataframe(
        frame, hide_index=True, key="job_list", on_select=choose, selection_mode="single-row",
        height=min(38 + 35 * len(jobs), 250),
        column_config={"done": st.column_config.ProgressColumn("done", format="percent", min_value=0, max_value=1)},
    )  # fmt: skip


def _do(verb: str, job: str) -> None:
    from bitatlas.app.jobs.service import Jobs

    try:
        jobs = Jobs(studies.home())
        jobs.cancel(job) if verb == "cancel" else jobs.resume(job)
        state.set_job(job)
    except UserError as e:
        st.session_state[_PROBLEM] = e


def _log(job: str) -> str:
    from bitatlas.app.jobs.service import Jobs

    return Jobs(studies.home()).logs(job, 60)
