"""Export: would this engine load it, and what would be written? Verdicts and files in, a frozen view out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitatlas.analysis.schema import Allocation, ModelIndex
from bitatlas.app.targets.base import Target
from bitatlas.app.targets.repair import repaired
from bitatlas.solvers import SOLVERS

__all__ = ["EngineRow", "ExportView", "UnitRow", "build_engines", "build_export", "first_shown"]

_WORDS = {
    "servable": "loads and serves this allocation",
    "loads but decodes wrong": "would load this allocation and decode it wrong",
    "rejected": "cannot load this allocation",
}


@dataclass(frozen=True, slots=True)
class UnitRow:
    """A unit that the engine does not take as planned; ``after`` is its format after the smallest change, "" without one."""

    unit: str
    planned: str
    reason: str
    after: str


@dataclass(frozen=True, slots=True)
class ExportView:
    """One engine's answer: verdict, reasons, the smallest change that helps, files and command (none if rejected).

    ``units``: every unit with a reason against it, and its format after the change. ``repaired``: the allocation file with
    that change, "" where none is needed or none helps. ``notes``, ``bytes`` (in the engine's container) and ``kv`` (its
    options for the cache) are the verdict's.
    """

    title: str
    target: str
    status: str
    reasons: tuple[str, ...]
    change: str
    units: tuple[UnitRow, ...]
    repaired: str
    notes: tuple[str, ...]
    bytes: int
    kv: str
    files: dict[str, str]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def first_shown(solvers: Sequence[str]) -> int:
    """Which allocation the page opens with, from the solver of each, newest first.

    The newest that something measured has decided; rules by hand are made to compare with.
    """
    by_hand = [s in SOLVERS and not SOLVERS[s].NEEDS_DAMAGE and not SOLVERS[s].METRICS for s in solvers]
    return by_hand.index(False) if False in by_hand else 0


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine in the table of all: verdict, the first reason against it, the smallest change, bytes in its container."""

    engine: str
    status: str
    reason: str
    change: str
    units: int
    bytes: int


def build_engines(
    targets: Iterable[Target], allocation: Allocation, index: ModelIndex
) -> tuple[EngineRow, ...]:
    """Ask every engine; servable ones first, in the order given."""
    rows = []
    for target in targets:
        verdict = target.check(allocation, index)
        reason = verdict.reasons[0] if verdict.reasons else ""
        rows.append(
            EngineRow(target.TITLE, verdict.status, reason, verdict.change, len(verdict.units), verdict.bytes)
        )
    return tuple(sorted(rows, key=lambda r: r.status != "servable"))


def build_export(target: Target, allocation: Allocation, index: ModelIndex) -> ExportView:
    """Ask the engine. Nothing is written."""
    verdict = target.check(allocation, index)
    changes = verdict.changes or {}
    usable = verdict.status != "rejected"
    return ExportView(
        title=f"{target.TITLE} {_WORDS[verdict.status]}",
        target=target.NAME,
        status=verdict.status,
        reasons=tuple(verdict.reasons),
        change=verdict.change,
        units=tuple(
            UnitRow(u, allocation.formats[u], why, changes.get(u, "")) for u, why in verdict.units.items()
        ),
        repaired=repaired(allocation, index, target).to_json() if changes else "",
        notes=verdict.notes,
        bytes=verdict.bytes,
        kv=verdict.kv,
        files=dict(target.render(allocation, index)) if usable else {},
        command=target.command(allocation, index) if usable else "",
    )
