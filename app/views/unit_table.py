"""The units behind a view as a table: all of them, or the selected ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import NO_FORMAT, parse_format
from bitatlas.app.selection import Selection
from bitatlas.app.studies import Study
from bitatlas.app.views.sensitivity_map import MapControls, MapView
from bitatlas.app.views.words import count

__all__ = ["UnitTable", "build"]


@dataclass(frozen=True, slots=True, eq=False)
class UnitTable:
    """Rows in order of falling value, unknown last; ``columns`` name -> array, all of the same length."""

    title: str
    columns: Mapping[str, object]
    ids: np.ndarray


def build(study: Study, view: MapView, controls: MapControls, selection: Selection, pins: Mapping[int, str], limit: int | None = None) -> UnitTable:  # fmt: skip
    """The selected units, all units when nothing is selected; ``limit`` keeps only the worst of them."""
    n = len(study.keys)
    ids = np.array(selection.ids, np.int64) if len(selection) else np.arange(n)
    value = view.value
    everywhere = np.argsort(np.where(np.isfinite(value), -value, np.inf), kind="stable")
    rank = np.empty(n, np.int64)
    rank[everywhere] = np.arange(1, n + 1)
    ids = ids[np.argsort(rank[ids], kind="stable")]
    title = _title(study, view, selection, ids, limit)
    ids = ids[:limit]
    c, units = study.columns, study.index.units
    columns: dict[str, object] = {
        "unit": [study.keys[i] for i in ids],
        "layer": c.layer[ids],
        "role": [c.roles[r] for r in c.role[ids]],
        "expert": [int(e) if e >= 0 else None for e in c.expert[ids]],
        "rows": [units[i].rows for i in ids],
        "cols": [units[i].cols for i in ids],
        "value": value[ids],
        "stderr": view.stderr[ids],
        "samples": _samples(study, controls)[ids],
        "rank": np.where(np.isfinite(value[ids]), rank[ids], 0),
    }
    if controls.format != NO_FORMAT:
        stored = parse_format(controls.format)
        columns["bytes"] = np.array(
            [stored.payload_bytes(units[i].rows, units[i].cols) for i in ids], np.int64
        )
    columns["pin"] = [pins.get(int(i), "") for i in ids]
    return UnitTable(title, columns, ids)


def _samples(study: Study, controls: MapControls) -> np.ndarray:
    table = study.tables[controls.metric]
    column = 0 if controls.format == NO_FORMAT else table.formats.index(controls.format)
    return table.count[:, column]


def _title(study: Study, view: MapView, selection: Selection, ids: np.ndarray, limit: int | None) -> str:
    if not len(selection) and limit is not None and limit < len(ids):
        return f"The {limit:,} worst of {count(len(ids), 'unit')}"
    if not len(selection):
        return f"All {count(len(ids), 'unit')}, worst first"
    total = float(np.nansum(np.maximum(view.value, 0)))
    share = float(np.nansum(np.maximum(view.value[ids], 0))) / total if total > 0 else float("nan")
    weights = float(study.columns.params[ids].sum() / study.columns.params.sum())
    unknown = int((~np.isfinite(view.value[ids])).sum())
    tail = f"; {unknown:,} unknown" if unknown else ""
    if not view.log:
        return f"{count(len(ids), 'unit')} selected: {weights:.1%} of the weights{tail}"
    return (
        f"{count(len(ids), 'unit')} selected: {share:.1%} of the damage in {weights:.1%} of the weights{tail}"
    )
