"""Comparing: what changes when one allocation becomes another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Allocation
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.solving import find_table, read_allocation
from bitatlas.app.tasks.stability import stability
from bitatlas.app.views.compare import Side, build_compare
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["compare"]

Named = str | Path | Allocation


def compare(model: str | Path, a: Named, b: Named, *, metric: str | None = None) -> dict[str, Any]:
    """Units that differ, bytes and damage by role from A to B, and how often A's units get their bits again.

    Args:
        metric: whose damages to account with; None = bytes and bits only. How stable A is, is always told by A's own metric.

    Raises:
        UserError: an allocation of another model, or a metric that was not measured in these formats.
    """
    index, store = register(model), Store(Home.default())
    one, other = (item if isinstance(item, Allocation) else read_allocation(item) for item in (a, b))
    for allocation in (one, other):
        allocation.check_model(index)
    table = None
    if metric:
        used = set(one.formats.values()) | set(other.formats.values())
        table = find_table(store, index, metric, tuple(sorted(used)))
    stable = stability(store, index, one)
    return build_compare(index, Side("A", one.formats), Side("B", other.formats), table, "", stable).to_dict()
