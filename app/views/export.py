"""Export: would this engine load it, and what would be written? Verdicts and files in, a frozen view out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bitatlas.analysis.schema import Allocation, ModelIndex
from bitatlas.app.targets.base import Target

__all__ = ["EngineRow", "ExportView", "build_engines", "build_export"]

_WORDS = {
    "servable": "loads and serves this allocation",
    "loads but decodes wrong": "would load this allocation and decode it wrong",
    "rejected": "cannot load this allocation",
}


@dataclass(frozen=True, slots=True)
class ExportView:
    """One engine's answer: verdict, reasons, the smallest change that helps, files and command (none if rejected)."""

    title: str
    target: str
    status: str
    reasons: tuple[str, ...]
    change: str
    files: dict[str, str]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


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
    usable = verdict.status != "rejected"
    return ExportView(
        title=f"{target.TITLE} {_WORDS[verdict.status]}",
        target=target.NAME,
        status=verdict.status,
        reasons=tuple(verdict.reasons),
        change=verdict.change,
        files=dict(target.render(allocation, index)) if usable else {},
        command=target.command(allocation, index) if usable else "",
    )
