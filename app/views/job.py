"""A job in words: how far, how long still, and whether it is alive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.views.words import duration

__all__ = ["STALLED_S", "JobView", "LayerProgress", "by_layer", "job_view", "ribbon"]

STALLED_S = 45.0
"""Seconds without a sign of life after which a running job counts as stalled; its own state, not a failure."""

_COLOURS = {
    "queued": "gray", "running": "blue", "stalled": "orange", "interrupted": "orange", "done": "green",
    "failed": "red", "cancelled": "gray",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobView:
    """One job for a person.

    Attributes:
        id, name: ``name`` is what it does to what.
        state: as in `JobStatus`, or ``stalled``; colour: of its badge.
        fraction: 0..1; steps: ``12 of 30 steps``; eta: ``2 to 4 min left`` or ``""``.
        line: all of it in one sentence; alive: the age of the last sign of life, in words.
        active: queued, running or stalled: worth looking again; can_cancel, can_resume: which buttons make sense.
    """

    id: str
    name: str
    state: str
    colour: str
    fraction: float
    steps: str
    eta: str
    line: str
    alive: str
    active: bool
    can_cancel: bool
    can_resume: bool


def job_view(status: JobStatus, model_name: str = "") -> JobView:
    """The words for a job; ``model_name`` when the request only knows a path."""
    state = status.state
    age = status.heartbeat_age_s
    if state == "running" and age is not None and age > STALLED_S:
        state = "stalled"
    done = status.done + status.fraction
    fraction = 1.0 if state == "done" else min(done / status.total, 1.0) if status.total else 0.0
    steps = f"{status.done:,} of {status.total:,} steps" if status.total else "no step yet"
    eta = _eta(status) if state == "running" else ""
    return JobView(
        status.id, _name(status, model_name), state, _COLOURS.get(state, "gray"), fraction, steps, eta,
        _line(status, state, steps, eta), f"last sign of life {duration(age)} ago" if age is not None else "",
        state in ("queued", "running", "stalled", "interrupted"), state in ("queued", "running", "stalled", "interrupted"),
        state in ("failed", "cancelled", "interrupted"),
    )  # fmt: skip


def _name(status: JobStatus, model_name: str) -> str:
    if status.title and status.title != status.kind:
        return status.title
    model = model_name or str(status.params.get("model", "")).rstrip("/").rsplit("/", 1)[-1]
    metrics = ", ".join(status.params.get("metrics", [])) or status.kind
    return f"{metrics} on {model}" if model else metrics


def _eta(status: JobStatus) -> str:
    if status.eta_s is None:
        return ""
    low, high = status.eta_s
    a, b = duration(low), duration(high)
    if a == b:
        return f"about {a} left"
    if a.rsplit(" ", 1)[-1] == b.rsplit(" ", 1)[-1] and a.count(" ") == b.count(" ") == 1:
        a = a.rsplit(" ", 1)[0]
    return f"{a} to {b} left"


def _line(status: JobStatus, state: str, steps: str, eta: str) -> str:
    if state == "queued":
        return "waiting for its turn"
    if state == "stalled":
        return f"no sign of life for {duration(status.heartbeat_age_s or 0)}; {steps} are safe"
    if state == "interrupted":
        return f"its worker is gone; {steps} are safe, the next worker goes on there"
    if state == "done":
        took = status.ended - status.started if status.ended and status.started else float("nan")
        return f"done in {duration(took)}" if took >= 0 else "done"
    if state == "failed":
        return status.error or "failed"
    if state == "cancelled":
        return f"cancelled; {steps} are safe"
    return " · ".join(
        filter(None, (status.phase if status.phase != "running" else "", steps, eta, status.note))
    )


def ribbon(jobs: Iterable[JobView]) -> str:
    """One short line about all active jobs, ``""`` when there is none."""
    active = [j for j in jobs if j.active]
    if not active:
        return ""
    order = ("running", "stalled", "interrupted", "queued")
    first = min(active, key=lambda j: order.index(j.state))
    more = f" · {len(active) - 1} more" if len(active) > 1 else ""
    facts = first.eta or ("waiting" if first.state == "queued" else first.state if first.state != "running" else first.steps)  # fmt: skip
    return (
        f"{first.fraction:.0%} · {facts}{more} · {first.name}"  # the name may be cut off, the numbers may not
    )


@dataclass(frozen=True, slots=True, eq=False)
class LayerProgress:
    """Progress by layer.

    Attributes:
        title: the answer.
        metrics: (M,) rows; layers: (L,) columns.
        done: (M, L) float32, share of the layer's steps that are done; NaN where the steps name no layer.
    """

    title: str
    metrics: tuple[str, ...]
    layers: tuple[int, ...]
    done: np.ndarray


_LAYERS = re.compile(r"(?:^|/)layers? (\d+)(?: ?(?:-|to) ?(\d+))?")


def by_layer(
    layers: int, steps: Mapping[str, Iterable[str]], fraction: float = float("nan")
) -> LayerProgress:
    """Which layers are measured, from the keys of the finished steps of every metric.

    A metric whose steps go through the text and not through the layers measures all of them at once: its row
    shows ``fraction``, the share of the job that is done.
    """
    out = np.full((len(steps), layers), np.nan, np.float32)
    for row, keys in enumerate(steps.values()):
        spans = [m for m in map(_LAYERS.search, keys) if m]
        out[row] = 0.0 if spans else fraction
        for m in spans:
            out[row, int(m[1]) : int(m[2] or m[1]) + 1] = 1.0
    n = int((out.min(axis=0) == 1).sum()) if len(steps) else 0
    return LayerProgress(f"{n} of {layers} layers measured", tuple(steps), tuple(range(layers)), out)
