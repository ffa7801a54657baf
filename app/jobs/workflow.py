"""The one workflow: plan, one step for each unit of work, finish. Imported by the worker only.

DBOS remembers finished steps, so a new worker goes on where a killed one stopped; the store remembers the rows,
together with the mark of their step, so nothing is measured into it twice and nothing acknowledged is lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from dbos import DBOS
from dbos import error as dbos_error

from bitatlas.analysis.schema import DamageRow, UserError
from bitatlas.app.jobs.session import JobFailed, Session, Stopped
from bitatlas.app.jobs.settings import PROGRESS, WORKFLOW
from bitatlas.cache.paths import Home

__all__ = ["configure", "run_job", "sessions"]

_HEARTBEAT_S = 1.0
_FINISH_KEY = "(finish)"

_home: list[Home] = []
_sessions: dict[str, Session] = {}
# Taken again by the signal handler of the thread that holds it.
_guard = threading.RLock()


def configure(home: Home) -> None:
    """Say which data folder this worker serves; before `DBOS.launch`."""
    _home[:] = [home]


def sessions() -> dict[str, Session]:
    """Jobs that this worker runs now."""
    with _guard:
        return dict(_sessions)


def _open(job: str, kind: str, params: Mapping[str, Any]) -> Session:
    session = Session(job, kind, params, _home[0])
    with _guard:
        previous, _sessions[job] = _sessions.get(job), session
    if previous is not None:
        previous.stop()  # resumed before the cancelled one had ended
    return session


def _close(session: Session) -> None:
    session.stop()
    with _guard:
        if _sessions.get(session.job) is session:
            del _sessions[session.job]


def _mine() -> Session:
    return _sessions[str(DBOS.workflow_id)]


class _Beat:
    """Publishes the progress of a session as an event, at most once a second unless forced."""

    def __init__(self, session: Session) -> None:
        self.session, self.last = session, 0.0

    def __call__(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self.last >= _HEARTBEAT_S:
            self.last = now
            DBOS.set_event(PROGRESS, self.session.progress.to_dict())


def _ask(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    beat = _Beat(session)
    beat(force=True)
    try:
        return session.ask(request, beat)
    except Stopped:
        # DBOS records nothing for a step that ends like this, so it runs again when the job is resumed.
        raise dbos_error.DBOSWorkflowCancelledError(f"job {session.job} was stopped") from None


def _store(session: Session, key: str, rows: Any) -> int:
    """Rows and the step's mark into the runs they belong to, one transaction each; returns the number of rows."""
    by_run = rows if isinstance(rows, dict) else dict.fromkeys(session.runs[:1], rows)
    for run, listed in by_run.items():
        session.store.write_step(run, key, [DamageRow(*row) for row in listed or []])
    session.known.add(key)
    return sum(len(listed or []) for listed in by_run.values())


@DBOS.step(name="plan")
def _plan() -> dict[str, Any]:
    session = _mine()
    plan = _ask(session, {"do": "plan"})
    return {"steps": list(plan["steps"]), "weights": list(plan["weights"]), "runs": list(plan["runs"])}


def _learn(session: Session) -> None:
    """See to it that the store knows the runs, and look up the steps that it has for any of them."""
    for run in session.described:
        session.store.begin_run(**run)
    session.known = set().union(*(session.store.steps_done(run) for run in session.runs))


@DBOS.step(name="unit")
def _unit(key: str) -> dict[str, Any]:
    session = _mine()
    if session.progress.computed == 0 and not session.known:
        _learn(session)
    if key in session.known:
        session.progress.done += 1
        return {"rows": 0, "note": "was there already"}
    started = time.monotonic()
    session.progress.phase = "running"
    answer = _ask(session, {"do": "run", "key": key})
    rows = _store(session, key, answer.get("rows") or [])
    seconds = time.monotonic() - started
    session.progress.step_done(seconds)
    note = str(answer.get("note", ""))
    session.log(
        f"step {session.progress.done}/{session.progress.total} {key}: {seconds:.2f} s, {rows} rows {note}"
    )
    return {"rows": rows, "note": note}


@DBOS.step(name="missing")
def _missing(keys: list[str]) -> list[str]:
    # A results file that lost its newest rows to damage is behind what DBOS remembers.
    session = _mine()
    if not session.runs:
        return []
    _learn(session)
    return [key for key in keys if key not in session.known]


@DBOS.step(name="finish")
def _finish() -> dict[str, Any]:
    session = _mine()
    session.progress.phase = "finishing"
    answer = _ask(session, {"do": "finish"})
    rows = answer.pop("rows", None)
    if rows:
        _store(session, _FINISH_KEY, rows)
    for run in session.runs:
        session.store.finish_run(run)
    session.progress.phase = "done"
    _Beat(session)(force=True)
    return answer


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
def run_job(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """Run a job to its end; returns ``{"result", "steps"}``.

    Raises:
        JobFailed: with a text for people.
    """
    session = _open(str(DBOS.workflow_id), kind, params)
    try:
        plan = _plan()
        session.described = plan["runs"]
        session.runs = [run["run"] for run in plan["runs"]]
        session.progress.begin(
            plan["steps"], plan.get("weights") or ()
        )  # plans of earlier versions have none
        _run_units(session, plan["steps"])
        again = _missing(plan["steps"])
        _run_units(session, again)
        return {"result": _finish(), "steps": len(plan["steps"])}
    except UserError as e:
        session.log(str(e))
        raise JobFailed(str(e), e.to_dict()) from None
    except JobFailed as e:
        session.log(f"failed: {e}")
        raise
    finally:
        _close(session)


def _run_units(session: Session, keys: list[str]) -> None:
    for number, key in enumerate(keys):
        # Steps that DBOS replays do not run, so what is done is counted here.
        session.progress.done = session.progress.total - len(keys) + number
        _unit(key)
