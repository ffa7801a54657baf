"""Jobs for people and scripts: list, show, logs, cancel, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.app.checks import check_seed
from bitatlas.app.jobs.request import JobRequest
from bitatlas.app.jobs.service import Jobs
from bitatlas.app.jobs.status import JobStatus
from bitatlas.cache.paths import Home

__all__ = [
    "jobs_cancel",
    "jobs_list",
    "jobs_logs",
    "jobs_resume",
    "jobs_show",
    "rebuild",
    "status_dict",
    "submit_and_wait",
]


def the_jobs() -> Jobs:
    """The jobs of the data folder."""
    return Jobs(Home.default())


def submit(kind: str, params: dict[str, Any], title: str) -> str:
    """Queue a request (the same request is the same job) and see to it that a worker lives.

    Raises:
        UserError: a seed that no generator takes.
    """
    check_seed(int(params.get("seed", 0)))
    return the_jobs().submit(JobRequest(kind, params, title))


def status_dict(status: JobStatus) -> dict[str, Any]:
    """A job's status as a JSON-able dictionary."""
    return asdict(status)


def submit_and_wait(job: str, wait: bool, on_progress: Callable[[Any], None] | None) -> JobStatus:
    """The job's status now, or with ``wait`` at its end.

    Raises:
        UserError: with ``wait``, the job's own error in its own words.
    """
    if not wait:
        return the_jobs().job(job)
    status = the_jobs().wait(job, on_progress)
    if status.state == "failed":
        raise_job_error(status)
    if status.state == "cancelled":
        raise UserError("the job was cancelled", found=job, fix=f"bitatlas jobs resume {job}")
    return status


def raise_job_error(status: JobStatus) -> None:
    """Raise a failed job's error as if it had happened here: the user's mistakes as `UserError`."""
    if status.user_error:
        words = status.user_error
        raise UserError(words["error"], found=words.get("found", ""), fix=words.get("fix", ""))
    raise RuntimeError(f"job {status.id} failed: {status.error}; see `bitatlas jobs logs {status.id}`")


def rebuild() -> dict[str, Any]:
    """Make the results file again from the copies of finished results; what had to be set aside so far is listed."""
    from bitatlas.cache.store import Store
    from bitatlas.cache.store import rebuild as remake

    home = Home.default()
    remake(home)
    store = Store(home)
    return {"models": len(store.models()), "runs": len(store.runs()), "repairs": store.repairs()}


def jobs_list() -> list[dict[str, Any]]:
    """One row per job, newest first."""
    return [
        {"id": s.id, "title": s.title, "state": s.state, "done": s.done, "total": s.total, "phase": s.phase}
        for s in the_jobs().jobs()
    ]  # fmt: skip


def jobs_show(job: str) -> dict[str, Any]:
    """Everything about one job."""
    return status_dict(the_jobs().job(job))


def jobs_logs(job: str, tail: int = 50) -> str:
    """The last lines of a job's log."""
    return the_jobs().logs(job, tail)


def jobs_cancel(job: str) -> dict[str, Any]:
    """Stop a job; its finished steps are kept."""
    the_jobs().cancel(job)
    return status_dict(the_jobs().job(job))


def jobs_resume(
    job: str, wait: bool = False, on_progress: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """Go on at the first unfinished step."""
    the_jobs().resume(job)
    return status_dict(submit_and_wait(job, wait, on_progress))
