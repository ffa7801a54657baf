"""Units in a few groups: experts by layer, by how often they are chosen, by what they suffer, by likeness; any units by role, name or choice.

All projections of an expert are in its group. Pure: tables in, groups out; no store, no page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import NO_FORMAT, ModelIndex, SensitivityTable, UserError
from bitatlas.app.selection import read_runs

__all__ = ["EVIDENCE", "KINDS", "ExpertGroups", "group_experts", "parse_grouping", "tokens_reached"]

KINDS = ("layer", "role", "frequency", "damage", "cluster", "regex", "units")
_MOST = 64
EVIDENCE = (
    "routing_count",
    "routing_frequency",
    "routing_weight",
    "alphaq_alpha",
    "alpha_hill",
    "spectral_alpha",
)
"""Measurements beside the damage that groups are made of."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertGroups:
    """names (G,) of the groups; of_unit (U,) group of each unit, -1 = in none."""

    names: tuple[str, ...]
    of_unit: np.ndarray

    def members(self, name: str) -> np.ndarray:
        """(U,) bool.

        Raises:
            UserError: no such group.
        """
        if name not in self.names:
            raise UserError(f"there is no group called {name!r}", found=f"groups: {', '.join(self.names)}")
        return np.asarray(self.of_unit == self.names.index(name))


def parse_grouping(text: str) -> tuple[str, str]:
    """``frequency:4`` -> ("frequency", "4"); 4 groups where no number is given.

    Raises:
        UserError: not a way to group experts.
    """
    kind, _, rest = text.partition(":")
    counted = kind in ("frequency", "damage", "cluster")
    ok = kind in KINDS and (not counted or (rest or "4").isdigit() and 2 <= int(rest or 4) <= _MOST)
    if not ok or (kind in ("regex", "units")) != bool(rest and not counted):
        raise UserError("units cannot be grouped like this", found=text[:80],
                        fix=f"layer, role, frequency:4, damage:4, cluster:6 (2 to {_MOST} groups), regex:PATTERN, or units:0-6,12")  # fmt: skip
    return kind, (rest or "4") if counted else rest


def group_experts(
    index: ModelIndex, tables: Mapping[str, SensitivityTable], grouping: str, metric: str = "", seed: int = 0
) -> ExpertGroups:
    """The groups of a model's units.

    Of any units: ``role``: one for each role; ``regex:PATTERN``: ``matched``, the units so named; ``units:RUNS``: ``selected``, those
    of the unit numbers (a selection's text). Of experts where there are any, else of all units: ``layer``: one for each block, by its
    number, ``outside`` for what is in none; ``damage:N``: q1 … qN with equally many each, the least hurt in q1; what is unknown is in
    ``unknown``. Of experts only: ``frequency:N``, the rarest in q1; ``cluster:N``: c1 … cN, k-means on standardised damage by
    format, traffic and tail exponents, rising in damage.

    Args:
        tables: what has been measured, over the index's units. metric: the damage.

    Raises:
        UserError: experts asked for in a dense model, evidence that has not been measured, a pattern that matches nothing.
    """
    kind, rest = parse_grouping(grouping)
    experts = np.array([u.expert for u in index.units])
    layers = np.array([u.layer for u in index.units])
    out = np.full(len(experts), -1)
    if kind == "role":
        roles, out = np.unique([u.role for u in index.units], return_inverse=True)
        return ExpertGroups(tuple(str(r) for r in roles), out)
    if kind == "regex":
        out[[i for i, u in enumerate(index.units) if _compiled(rest).search(u.key)]] = 0
        if not (out == 0).any():
            raise UserError(
                "the pattern matches no unit", found=rest, fix="`bitatlas scan MODEL` names the units"
            )
        return ExpertGroups(("matched",), out)
    if kind == "units":
        try:
            chosen = np.array(read_runs(rest, len(experts), "unit"), np.int64)
        except ValueError as e:
            raise UserError("the units of this group cannot be read", found=f"units:{rest[:80]}: {e}", fix="units:0-6,12") from None  # fmt: skip
        out[chosen] = 0
        return ExpertGroups(("selected",), out)
    routed = np.flatnonzero(experts >= 0)
    if not routed.size:
        if kind not in ("layer", "damage"):
            raise UserError(
                f"{index.name} has no experts to group by {kind}",
                fix="group by layer, role, damage:4 or regex:PATTERN",
            )
        routed, experts = np.arange(len(experts)), np.arange(len(experts))  # every unit stands for itself
    where = np.unique((layers[routed] + 1) * (1 + experts.max()) + experts[routed], return_inverse=True)[1]
    count = int(where.max()) + 1
    if kind == "layer":
        found, out[routed] = np.unique(layers[routed], return_inverse=True)
        return ExpertGroups(tuple(str(n) if n >= 0 else "outside" for n in found), out)
    if kind == "frequency":
        value = _sum(_needed(tables, "routing_count", "routing").damage[routed, 0], where, count)
        names, label = _quantiles(value, int(rest))
    elif kind == "damage":
        table = _needed(tables, metric, metric)
        middle = next(
            (f for f, n in enumerate(table.formats) if n.startswith("int3")), len(table.formats) // 2
        )
        names, label = _quantiles(_sum(table.damage[routed, middle], where, count), int(rest))
    else:
        names, label = _clusters(_evidence(tables, metric, routed, where, count), int(rest), seed)
    out[routed] = label[where]
    return ExpertGroups(names, out)


def tokens_reached(index: ModelIndex, tables: Mapping[str, SensitivityTable]) -> np.ndarray:
    """(U,) tokens of the calibration text that reached each expert's unit; NaN where routing was not measured, or no expert."""
    out = np.full(len(index.units), np.nan)
    if "routing_count" in tables:
        inside = np.array([u.expert >= 0 for u in index.units])
        out[inside] = tables["routing_count"].damage[inside, 0]
    return out


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError("the regular expression is not valid", found=f"{pattern!r}: {e}") from None


def _needed(tables: Mapping[str, SensitivityTable], name: str, measure: str) -> SensitivityTable:
    if name not in tables:
        raise UserError(f"experts cannot be grouped by {name or 'a damage'}", found="it has not been measured",
                        fix=f"bitatlas measure MODEL --metric {measure or 'fisher'}")  # fmt: skip
    return tables[name]


def _sum(values: np.ndarray, where: np.ndarray, count: int) -> np.ndarray:
    """(E,) of an expert's projections together; NaN as soon as one is unknown."""
    return np.bincount(where, values, count)


def _quantiles(value: np.ndarray, n: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Groups of equal size by rank; unknown values are a group of their own."""
    known = np.isfinite(value)
    names = tuple(f"q{i + 1}" for i in range(n))
    label = np.full(len(value), n)
    order = np.argsort(value[known], kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    label[known] = rank * n // max(len(order), 1)
    return (names if known.all() else (*names, "unknown")), label


def _evidence(
    tables: Mapping[str, SensitivityTable], metric: str, routed: np.ndarray, where: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(E, D) standardised evidence, unknown values at the middle, and (E,) a damage to order the groups by."""
    columns, size = [], np.bincount(where, minlength=count)
    order = np.zeros(count)
    if metric in tables:
        table = tables[metric]
        for f in range(len(table.formats)):
            columns.append(np.log(np.maximum(_sum(table.damage[routed, f], where, count), 1e-30)))
        order = columns[0]
    for name in EVIDENCE[1:]:
        if name in tables and tables[name].formats == (NO_FORMAT,):
            value = _sum(tables[name].damage[routed, 0], where, count) / size
            columns.append(np.log1p(value * len(size)) if name.startswith("routing") else value)
    if not columns:
        raise UserError("there is no evidence to cluster experts by", found="neither damage, routing nor alpha has been measured",
                        fix="bitatlas measure MODEL --metric fisher,routing,alphaq")  # fmt: skip
    x = np.stack(columns, 1)
    x = np.where(np.isfinite(x), x, np.nanmedian(np.where(np.isfinite(x), x, np.nan), axis=0))
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0), np.nan_to_num(order, nan=np.inf)


def _clusters(
    evidence: tuple[np.ndarray, np.ndarray], n: int, seed: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """k-means (Lloyd) from k-means++ seeds (Arthur & Vassilvitskii 2007); names rise with the groups' median damage."""
    x, order = evidence
    rng = np.random.default_rng(seed)
    n = min(n, len(np.unique(x, axis=0)))
    centres = x[[int(rng.integers(len(x)))]]
    while len(centres) < n:
        far = _distances(x, centres).min(axis=1)
        centres = np.vstack([centres, x[int(rng.choice(len(x), p=far / far.sum()))]])
    label = np.zeros(len(x), np.int64)
    for _ in range(100):
        new = _distances(x, centres).argmin(axis=1)
        if (new == label).all() and _:
            break
        label = new
        members = np.bincount(label, minlength=n)
        total = np.stack([np.bincount(label, column, n) for column in x.T], 1)
        centres = np.where(members[:, None] > 0, total / np.maximum(members, 1)[:, None], centres)
    found, label = np.unique(label, return_inverse=True)
    place = np.argsort(np.argsort([np.median(order[label == c]) for c in range(len(found))], kind="stable"))
    return tuple(f"c{i + 1}" for i in range(len(found))), place[label]


def _distances(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(E, K) squared distances, never below zero."""
    cross = x @ centres.T
    return np.maximum((x**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * cross, 0.0)
