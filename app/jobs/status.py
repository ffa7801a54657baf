"""What a client sees of a job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FINAL", "JobStatus", "make_status"]

FINAL = ("done", "failed", "cancelled")
"""States in which nothing happens any more, unless somebody resumes the job."""

_STALE_S = 15.0
_STATES = {
    "DELAYED": "queued", "ENQUEUED": "queued", "PENDING": "running", "SUCCESS": "done", "ERROR": "failed",
    "CANCELLED": "cancelled", "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job, as it is now.

    Attributes:
        id, kind, title, params: as requested.
        state: ``queued``, ``running``, ``done``, ``failed``, ``cancelled``, ``interrupted`` (its worker is
            gone; the next worker goes on with it).
        phase: ``starting``, ``running``, ``finishing``; done, total: steps; fraction: of the step in hand.
        rate: steps per second; eta_s: seconds left, a range; both None while unknown.
        heartbeat_age_s: since the last sign of life; None before the first.
        note: what it is doing.
        created, started, ended: Unix seconds; None = not yet.
        error: why it failed; user_error: the same as ``error``, ``found``, ``fix`` when it is the user's to mend.
        result: what it gave.
    """

    id: str
    kind: str
    title: str
    params: dict[str, Any]
    state: str
    phase: str = ""
    done: int = 0
    total: int = 0
    fraction: float = 0.0
    rate: float | None = None
    eta_s: tuple[float, float] | None = None
    heartbeat_age_s: float | None = None
    note: str = ""
    created: float | None = None
    started: float | None = None
    ended: float | None = None
    error: str = ""
    user_error: dict[str, str] | None = None
    result: dict[str, Any] | None = None

    @property
    def final(self) -> bool:
        """Done, failed or cancelled."""
        return self.state in FINAL


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def make_status(
    found: Any, progress: Mapping[str, Any] | None, worker_alive: bool, shared: bool
) -> JobStatus:
    """A `JobStatus` from what DBOS says.

    Args:
        found: DBOS's WorkflowStatus.
        progress: the progress event, or None.
        worker_alive: a worker of this data folder lives.
        shared: other machines may run jobs of the same database, so a missing local worker proves nothing.
    """
    p, attributes = dict(progress or {}), dict(found.attributes or {})
    state = _STATES.get(found.status, "queued")
    age = max(0.0, time.time() - p["at"]) if "at" in p else None
    if state == "running" and not worker_alive and (not shared or age is None or age > _STALE_S):
        state = "interrupted"
    output = found.output if state == "done" and isinstance(found.output, Mapping) else None
    live = state in ("running", "interrupted")
    total = int(output["steps"]) if output else int(p.get("total", 0))
    eta = p.get("eta")
    return JobStatus(
        id=found.workflow_id,
        kind=str(attributes.get("kind", "")),
        title=str(attributes.get("title", "")),
        params=dict(attributes.get("params") or {}),
        state=state,
        phase=str(p.get("phase", "")) if live else "",
        done=total if output else int(p.get("done", 0)),
        total=total,
        fraction=float(p.get("fraction", 0.0)) if live else 0.0,
        rate=p.get("rate") if state == "running" else None,
        eta_s=(float(eta[0]), float(eta[1])) if eta and state == "running" else None,
        heartbeat_age_s=age if live else None,
        note=str(p.get("note", "")),
        created=_seconds(found.created_at),
        started=_seconds(found.dequeued_at),
        ended=_seconds(found.completed_at),
        error=str(getattr(found.error, "message", None) or found.error or "") if state == "failed" else "",
        user_error=getattr(found.error, "data", None) or None if state == "failed" else None,
        result=dict(output["result"]) if output else None,
    )
