"""Jobs for the pages: what there is, one of them closely, and the ribbon that follows them."""

from __future__ import annotations

import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import studies
from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.views.job import job_view, ribbon
from bitatlas.app.widgets.data import forget, get_studies

__all__ = ["follow", "job_ribbon", "jobs_now", "model_name"]

POLL_S = 2.0


def jobs_now() -> list[JobStatus]:
    """The newest jobs, at most a second old; none as long as nobody has ever started one."""
    home = studies.home()
    return _jobs(str(home.root)) if home.jobs_db.exists() else []


@st.cache_data(ttl=1, show_spinner=False)
def _jobs(root: str) -> list[JobStatus]:
    from bitatlas.app.jobs.service import Jobs

    return Jobs(studies.home()).jobs(limit=50)


def model_name(status: JobStatus) -> str:
    """The name of the model a job works on, "" when the library does not know it."""
    digest = status.params.get("digest") or status.params.get("model_digest")
    return next((s.name for s in get_studies() if s.digest == digest), "")


def follow() -> float | None:
    """Seconds between two looks at the jobs; None while nothing runs, so that an idle tab makes no traffic."""
    return POLL_S if any(not j.final for j in jobs_now()) else None


def job_ribbon() -> None:
    """The ribbon: what runs, how far, how long still."""
    try:
        every = follow()
    except UserError:
        return
    st.fragment(_ribbon, run_every=every)()


def _ribbon() -> None:
    jobs = jobs_now()
    active = {j.id for j in jobs if not j.final}
    before = st.session_state.get("_active_jobs", active)
    st.session_state["_active_jobs"] = active
    if before - active:
        # Something ended: the whole page has something new to show, and the polling may stop.
        forget()
        st.rerun(scope="app")
    text = ribbon([job_view(j, model_name(j)) for j in jobs])
    if text:
        st.page_link(st.session_state["_pages"]["run"], label=text, icon=":material/progress_activity:", help="Follow it on the Run page")  # fmt: skip
