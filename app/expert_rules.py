"""Rules for experts on top of an allocation problem: limits on groups, floors for rare ones, what shares a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bitatlas.analysis.schema import ModelIndex, SensitivityTable, TieGroup, UserError, parse_format
from bitatlas.app.expert_groups import ExpertGroups, group_experts, tokens_reached
from bitatlas.app.sizes import parse_bytes
from bitatlas.solvers import Problem, SideBudget

__all__ = ["TIES", "ExpertRules", "expert_ties", "floor_mask", "group_budgets", "rare_units", "under_rules"]

TIES = ("free", "gate-up", "expert", "layer")


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """What was asked of the experts.

    Attributes:
        groups: how they are grouped (`expert_groups`), "" for not at all.
        limits: ``q1=2.5`` (bits per weight) or ``q1=200MB`` for each limited group; ``*`` stands for all the others.
        floor: rare experts get at least this format, "" for no floor.
        below: rare is who was reached by fewer tokens than this; 1 = never reached.
        ties: ``free``; ``gate-up`` of an expert, all of an ``expert``, or all experts of a ``layer`` share a format.
    """

    groups: str = ""
    limits: tuple[str, ...] = ()
    floor: str = ""
    below: int = 1
    ties: str = "free"

    def __bool__(self) -> bool:
        return bool(self.limits or self.floor or self.ties != "free")

    @classmethod
    def of(cls, told: Mapping[str, Any] | None) -> ExpertRules:
        """The rules that `settings` (or JSON of it) tells under "experts"; None = no rules."""
        told = dict(told or {})
        return cls(**told | {"limits": tuple(told.get("limits", ()))})

    def settings(self) -> dict[str, Any]:
        """For the provenance."""
        return {"experts": asdict(self)}


def under_rules(
    problem: Problem,
    index: ModelIndex,
    tables: Mapping[str, SensitivityTable],
    rules: ExpertRules,
    metric: str,
    seed: int = 0,
) -> Problem:
    """The problem with the floors and group limits of ``rules``. Its ties are there from the start: see `expert_ties`.

    Raises:
        UserError: rules that cannot be met, evidence that has not been measured.
    """
    if rules.floor:
        if not (problem.experts >= 0).any():
            raise UserError(
                f"{index.name} has no experts that could be rare",
                found=f"--rare-floor {rules.floor}",
                fix="leave it out",
            )
        rare = rare_units(index, tables, problem, rules.below)
        allowed = floor_mask(problem, index, rare, rules.floor)
        problem = replace(problem, allowed=allowed)
        stuck = np.flatnonzero(~problem.classes.allowed.any(axis=1))
        if stuck.size:
            unit = problem.units[int(np.flatnonzero(problem.classes.of_unit == stuck[0])[0])]
            raise UserError(f"no format of {', '.join(problem.formats)} is as large as the floor {rules.floor}", found=unit,
                            fix="allow a larger format, lower the floor, or free pins and ties")  # fmt: skip
    if rules.limits:
        if not rules.groups:
            raise UserError("limits on groups need a way to group", found=", ".join(rules.limits), fix="--expert-groups frequency:4")  # fmt: skip
        groups = group_experts(index, tables, rules.groups, metric, seed)
        problem = replace(problem, side=(*problem.side, *group_budgets(problem, groups, rules.limits)))
    return problem


def rare_units(
    index: ModelIndex, tables: Mapping[str, SensitivityTable], problem: Problem, below: int
) -> np.ndarray:
    """(U,) bool, units of experts that fewer than ``below`` tokens reached, or whose damage nobody measured.

    Raises:
        UserError: counts are needed and routing has not been measured.
    """
    reached = tokens_reached(index, tables)
    inside = problem.experts >= 0
    if below > 1 and not np.isfinite(reached[inside]).any():
        raise UserError("how often experts are reached is not known", found="routing has not been measured",
                        fix=f"bitatlas measure {index.path} --metric routing, or --rare-below 1")  # fmt: skip
    unknown = problem.imputed if problem.imputed.size else np.zeros(len(inside), bool)
    return np.asarray(inside & ((reached < below) | unknown))


def floor_mask(problem: Problem, index: ModelIndex, rare: np.ndarray, floor: str) -> np.ndarray:
    """(U, F) bool: ``problem.allowed`` with rare units kept to formats of no fewer bytes than ``floor``; pins by hand stay."""
    sizes = index.bytes_table([parse_format(f) for f in (*problem.formats, floor)])
    free = ~rare | np.isin(np.array(problem.units, object), list(problem.pins))
    return np.asarray(problem.allowed & (free[:, None] | (sizes[:, :-1] >= sizes[:, -1:])))


def group_budgets(problem: Problem, groups: ExpertGroups, limits: tuple[str, ...]) -> tuple[SideBudget, ...]:
    """One limit on bytes for each named group.

    Raises:
        UserError: an unknown group, one named twice, or a limit that is none.
    """
    asked: dict[str, str] = {}
    for rule in limits:
        name, mark, value = rule.partition("=")
        if not mark or not value.strip() or name in asked:
            raise UserError("a limit on a group is written NAME=BITS or NAME=SIZE, once for each",
                            found=rule, fix="q1=2.5, or q4=200MB")  # fmt: skip
        asked[name.strip()] = value.strip()
    rest = asked.pop("*", None)
    if rest is not None:
        asked |= {name: rest for name in groups.names if name not in asked}
    out = []
    for name, value in asked.items():
        members = groups.members(name)
        limit = _bytes_of(value, int(problem.params[members].sum()))
        out.append(
            SideBudget(
                f"group {name}",
                np.where(members[:, None], problem.bytes, 0).astype(float),
                float(limit),
                f"--group-limit {name}",
            )  # fmt: skip
        )
    return tuple(out)


def _bytes_of(value: str, weights: int) -> int:
    """A plain number up to 32 is bits per weight, everything else a size."""
    try:
        bits = float(value)
    except ValueError:
        return parse_bytes(value)
    if 0 < bits <= 32:
        return int(bits * weights / 8)
    return parse_bytes(value)


def expert_ties(index: ModelIndex, ties: str) -> tuple[TieGroup, ...]:
    """Units of experts that must share a format.

    Raises:
        UserError: no such rule.
    """
    if ties not in TIES:
        raise UserError(
            "there is no such rule for what experts share", found=ties, fix=f"one of {', '.join(TIES)}"
        )
    if ties == "free":
        return ()
    if not any(u.expert >= 0 for u in index.units):
        raise UserError(
            f"{index.name} has no experts that could share a format",
            found=f"--expert-ties {ties}",
            fix="leave it out",
        )
    found: dict[str, list[str]] = {}
    for u in index.units:
        if u.expert >= 0 and (ties != "gate-up" or u.role in ("gate", "up")):
            name = (
                f"experts of layer {u.layer}" if ties == "layer" else f"expert {u.expert} of layer {u.layer}"
            )
            found.setdefault(name, []).append(u.key)
    return tuple(TieGroup(name, tuple(keys)) for name, keys in found.items() if len(keys) > 1)
