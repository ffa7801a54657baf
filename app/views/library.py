"""Which models and studies there are, how complete, how fresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitatlas.app.studies import StudyInfo
from bitatlas.app.views.words import count, params

__all__ = ["FRESHNESS", "LibraryView", "build"]

FRESHNESS: dict[str, str] = {
    "fresh": "same checkpoint on disk",
    "changed": "checkpoint has changed",
    "missing": "checkpoint not found",
}
"""What was found at the model's path, in words."""


@dataclass(frozen=True, slots=True)
class LibraryView:
    """``columns``: name -> one value a study, in the order of ``digests``."""

    title: str
    subtitle: str
    digests: tuple[str, ...]
    columns: Mapping[str, Sequence[object]]


def build(infos: Sequence[StudyInfo], freshness: Mapping[str, str]) -> LibraryView:
    """The library; ``freshness``: digest -> a key of `FRESHNESS`."""
    measured = [s for s in infos if s.metrics]
    stale = sum(freshness.get(s.digest) in ("changed", "missing") for s in measured)
    best = max(measured, key=lambda s: (len(s.metrics), s.units), default=None)
    if not infos:
        title = "No model here yet"
    elif best is None:
        title = f"{count(len(infos), 'model')}, nothing measured yet"
    else:
        n = len(best.metrics)
        title = f"{len(measured)} of {count(len(infos), 'model')} measured; {best.name} knows {count(n, 'metric')}"
    facts = [f"{sum(s.units for s in infos):,} units", f"{sum(s.allocations for s in infos)} allocations",
             f"{sum(s.verifications for s in infos)} verified"]  # fmt: skip
    if stale:
        facts.append(f"{stale} measured on a checkpoint that is no longer there")
    columns: dict[str, Sequence[object]] = {
        "model": [s.name for s in infos],
        "architecture": [s.architecture for s in infos],
        "weights": [params(s.params) for s in infos],
        "units": [s.units for s in infos],
        "experts": [str(s.experts) if s.experts else "dense" for s in infos],
        "coverage": [_coverage(s) for s in infos],
        "metrics": [[m.name for m in s.metrics] for s in infos],
        "allocations": [s.allocations for s in infos],
        "verified": [s.verifications for s in infos],
        "freshness": [FRESHNESS.get(freshness.get(s.digest, ""), "not checked") for s in infos],
        "path": [s.path for s in infos],
    }
    return LibraryView(title, " · ".join(facts) if infos else "", tuple(s.digest for s in infos), columns)


def _coverage(info: StudyInfo) -> float:
    """Share of unit x format cells that the best-covered metric has rows for."""
    return max((m.coverage for m in info.metrics), default=0.0)
