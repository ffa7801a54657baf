"""What do rules for experts cost? Groups of experts under a budget, and the front over bytes and over bytes read per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bitatlas.analysis.schema import ModelIndex, UserError
from bitatlas.app.expert_groups import ExpertGroups
from bitatlas.app.side_budgets import active_bytes
from bitatlas.app.sizes import format_bytes
from bitatlas.solvers import FrontCache, Problem

__all__ = ["BudgetFronts", "ExpertBudgetView", "GroupRow", "build", "fronts"]

_POINTS = 48


@dataclass(frozen=True, slots=True, eq=False)
class BudgetFronts:
    """The best damage at every size, and at every number of bytes read per token; (P,) each, rising in their own axis.

    ``by_size``, ``by_reading``: columns weight bytes (kept tensors included), bytes read per token, damage.
    """

    by_size: np.ndarray
    by_reading: np.ndarray


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group: experts in it, tokens that reached them (share of all), and what the answer gives them."""

    group: str
    experts: int
    tokens: float
    bits: float
    nbytes: int
    damage: float
    share: float
    limit: int | None


@dataclass(frozen=True, slots=True)
class ExpertBudgetView:
    """The answer under the rules.

    Attributes:
        title, detail: in words. rows: by group; the units that are no experts (or in no group) come last.
        here: weight bytes, bytes read per token, damage. free: damage at the same size without rules, NaN when unknown.
        gap: to the lower bound. bits: effective bits per weight.
    """

    title: str
    detail: str
    rows: tuple[GroupRow, ...]
    here: tuple[int, int, float]
    free: float
    gap: float
    bits: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the download."""
        return asdict(self)


def fronts(index: ModelIndex, problem: Problem, cache: FrontCache) -> BudgetFronts:
    """Both fronts of a problem. Experts of one model are all read equally often, so limits on their bytes hold for what is read too."""
    reads = active_bytes(index, problem.formats)
    whole = np.rint(reads).astype(np.int64)
    side = []
    for limit in problem.side:
        members = (limit.cost != 0).any(axis=1)
        share = reads[members].sum() / max(float(problem.bytes[members].sum()), 1.0)
        least = np.where(problem.allowed, whole, np.iinfo(np.int64).max)[members].min(axis=1).sum()
        # Rounded to whole bytes a limit at its very least would be missed by a few.
        side.append(replace(limit, cost=np.where(members[:, None], whole, 0).astype(float), limit=max(limit.limit * share, float(least))))  # fmt: skip
    fast = FrontCache.of(replace(problem, bytes=whole, side=tuple(side)))
    return BudgetFronts(_walk(index, problem, cache, reads, 0), _walk(index, problem, fast, reads, 1))


def _walk(index: ModelIndex, problem: Problem, cache: FrontCache, reads: np.ndarray, axis: int) -> np.ndarray:
    size = cache.cum_bytes
    at = np.unique(
        np.searchsorted(size, np.linspace(float(size[0]), float(size[-1]), _POINTS), side="right") - 1
    )
    rows, out = np.arange(len(problem.units)), []
    for k in at.tolist():
        choice = cache.classes.expand(cache.class_choice(k))
        out.append(
            (problem.payload(choice) + index.kept_bytes, reads[rows, choice].sum(), problem.objective(choice))
        )
    found = np.array(out, np.float64)
    return found[np.argsort(found[:, axis], kind="stable")]


def build(
    index: ModelIndex, problem: Problem, cache: FrontCache, limit_bytes: int, groups: ExpertGroups | None,
    reached: np.ndarray, free: FrontCache | None = None,
) -> ExpertBudgetView:  # fmt: skip
    """The best allocation within ``limit_bytes`` of units, by group.

    Args:
        reached: (U,) tokens that reached each unit's expert, NaN where nobody counted.
        free: the front without rules, to say what they cost.

    Raises:
        UserError: the budget is below the smallest allocation under the rules.
    """
    try:
        point = cache.at(limit_bytes)
    except ValueError:
        least = int(cache.cum_bytes[0])
        raise UserError("the budget is too small for these rules", found=f"{format_bytes(limit_bytes)} for the units",
                        fix=f"at least {format_bytes(least)}, that is {least * 8 / max(index.params, 1):.2f} bits per weight") from None  # fmt: skip
    rows = np.arange(len(problem.units))
    size, damage = problem.bytes[rows, point.choice], problem.damage[rows, point.choice]
    reads = float(active_bytes(index, problem.formats)[rows, point.choice].sum())
    table = _rows(problem, groups, size, damage, reached)
    best = (
        free.at(limit_bytes).objective
        if free is not None and limit_bytes >= free.cum_bytes[0]
        else float("nan")
    )
    price = point.objective / best - 1 if best > 0 else float("nan")
    gap = (point.objective - point.lower_bound) / point.objective if point.objective > 0 else 0.0
    inside = problem.experts >= 0
    bits = float(size[inside].sum() * 8 / max(problem.params[inside].sum(), 1))
    title = f"Experts get {bits:.2f} bits per weight, all else {_bits(size, problem.params, ~inside):.2f}"
    words = [
        f"{format_bytes(point.payload_bytes + index.kept_bytes)} of weights, of which a token reads {format_bytes(reads)}"
    ]
    if np.isfinite(price):
        words.append(
            "the rules cost nothing" if price < 5e-4 else f"the rules cost {price:.1%} more predicted damage"
        )
    words.append(f"{gap:.1%} above the lower bound")
    return ExpertBudgetView(
        title, " · ".join(words), table, (point.payload_bytes + index.kept_bytes, round(reads), point.objective), best, gap,
        point.payload_bytes * 8 / max(index.params, 1),
    )  # fmt: skip


def _bits(size: np.ndarray, params: np.ndarray, mask: np.ndarray) -> float:
    return float(size[mask].sum() * 8 / max(params[mask].sum(), 1))


def _rows(
    problem: Problem, groups: ExpertGroups | None, size: np.ndarray, damage: np.ndarray, reached: np.ndarray
) -> tuple[GroupRow, ...]:
    limits: Mapping[str, float] = {s.name: s.limit for s in problem.side}
    inside = problem.experts >= 0
    parts = [] if groups is None else [(name, groups.of_unit == g) for g, name in enumerate(groups.names)]
    grouped = np.zeros(len(inside), bool) if groups is None else groups.of_unit >= 0
    parts += [
        ("other experts" if parts else "experts", inside & ~grouped),
        ("no experts", ~inside & ~grouped),
    ]
    width = int(problem.experts.max()) + 1
    traffic, total = np.nansum(reached), damage.sum()
    out = []
    for name, mask in parts:
        if not mask.any():
            continue
        experts = len(np.unique(problem.layers[mask & inside] * width + problem.experts[mask & inside]))
        tokens = float(np.nansum(reached[mask]) / traffic) if traffic > 0 and experts else float("nan")
        limit = limits.get(f"group {name}")
        out.append(GroupRow(name, experts, tokens, _bits(size, problem.params, mask), int(size[mask].sum()), float(damage[mask].sum()),
                            float(damage[mask].sum() / total) if total > 0 else 0.0, int(limit) if limit is not None else None))  # fmt: skip
    return tuple(out)
