"""Repairing: a plan that an engine does not serve, changed as little as possible until it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app.tasks.shipping import index_of
from bitatlas.app.tasks.solving import read_allocation
from bitatlas.cache.paths import Home, write_output
from bitatlas.cache.store import Store

__all__ = ["repair"]


def repair(
    allocation: str | Path | Allocation, target: str, output: str | Path, *, model: str | None = None
) -> dict[str, Any]:
    """Write ``allocation`` with the smallest change that makes the engine serve it, and store it.

    Returns:
        the verdict on ``allocation`` as `tasks.check` gives it, and ``repaired``: file, changed (units), bytes (in the
        engine's container), over_budget (bytes beyond the budget that was asked for, 0 within) and pins_dropped.

    Raises:
        UserError: no engine is named, or no choice of formats makes it load the model; nothing is written then.
    """
    from bitatlas.app.targets import get_target
    from bitatlas.app.targets.repair import repaired

    if not target:
        raise UserError("a plan is repaired for one engine", found="no --target", fix="--target vllm")
    plan = allocation if isinstance(allocation, Allocation) else read_allocation(allocation)
    index, engine = index_of(plan, model), get_target(target)
    verdict = engine.check(plan, index)
    fixed = repaired(plan, index, engine)
    nbytes = engine.engine_bytes(fixed, index)
    write_output(output, fixed.to_json().encode())
    Store(Home.default()).put_allocation(fixed)
    return {
        "target": target,
        **verdict.to_dict(),
        "repaired": {
            "file": str(Path(output).expanduser().resolve()),
            "changed": len(verdict.changes or {}),
            "bytes": nbytes,
            "over_budget": max(0, nbytes - fixed.budget.weights_bytes) if fixed.budget else 0,
            "pins_dropped": len(plan.pins) - len(fixed.pins),
        },
    }
