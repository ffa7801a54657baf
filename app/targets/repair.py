"""A plan with the smallest change that makes an engine serve it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from bitatlas.analysis.schema import FORMATS, Allocation, ModelIndex, UserError
from bitatlas.app.targets.base import SERVABLE, Target

__all__ = ["repaired"]


def repaired(allocation: Allocation, index: ModelIndex, target: Target) -> Allocation:
    """``allocation`` with the smallest change applied; itself when nothing has to change.

    The prediction and its certificate are dropped: they were made for other formats. Pins that the change overrules are
    dropped too, and the budget stays as it was asked for, met or not.

    Raises:
        UserError: no choice of formats makes the engine load the model, or the allocation is for another model.
    """
    verdict = target.check(allocation, index)
    if verdict.status == SERVABLE:
        return allocation
    if not verdict.changes:
        raise UserError(f"{target.NAME} cannot be given this model by changing formats",
                        found="; ".join(verdict.reasons[:3]), fix="another --target; `bitatlas check PLAN` asks every engine")  # fmt: skip
    formats: Mapping[str, str] = allocation.formats | dict(verdict.changes)
    payload = sum(FORMATS[formats[u.key]].payload_bytes(u.rows, u.cols) for u in index.units)
    origin = allocation.provenance
    return replace(
        allocation,
        formats=dict(formats),
        payload_bytes=payload,
        bits_per_weight=payload * 8 / max(index.params, 1),
        predicted=math.nan,
        lower_bound=math.nan,
        gap=math.nan,
        status="feasible",
        solver=f"{allocation.solver}+repair" if allocation.solver else "repair",
        pins={u: f for u, f in allocation.pins.items() if formats[u] == f},
        provenance=replace(origin, settings={**origin.settings, "repaired_for": target.NAME}),
    )
