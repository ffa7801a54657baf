"""Export: would this engine load it, and what would be written? Verdicts and files in, a frozen view out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bitatlas.analysis.schema import Allocation, ModelIndex
from bitatlas.app.targets.base import Target

__all__ = ["ExportView", "build_export"]

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
