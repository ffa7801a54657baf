"""What the Fit page keeps between reruns: the front of a problem, so that the slider only looks up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import streamlit as st

from bitatlas.analysis.schema import Allocation, ModelIndex, Provenance, parse_format
from bitatlas.app import studies
from bitatlas.app.expert_rules import ExpertRules, expert_ties, under_rules
from bitatlas.app.kv_plan import kv_pairs, pair_names
from bitatlas.app.studies import Study
from bitatlas.app.targets import get_target
from bitatlas.app.targets.limits import Limits, limits_of
from bitatlas.app.tasks.solving import build_problem, in_own_bytes
from bitatlas.app.views.fit_controls import Asked
from bitatlas.app.widgets.data import forget
from bitatlas.solvers import FrontCache, Problem, get_solver, to_allocation

__all__ = ["answer", "front", "keep", "sizes", "unit_of"]


def front(
    study: Study,
    metric: str,
    formats: tuple[str, ...],
    pins: Mapping[str, str],
    rules: ExpertRules | None = None,
    target: str = "",
) -> tuple[Problem, FrontCache]:
    """The problem and its whole front; solved once per (table, formats, pins, rules, target), shared by all sessions.

    ``problem.kept_bytes`` is what the file keeps beside the units: the target's container may keep more than ours.

    Raises:
        UserError: pins, formats, rules for experts or a target that cannot be.
    """
    runs = tuple(t.run for t in study.tables.values())
    return _front(
        study.index.digest,
        runs,
        metric,
        formats,
        tuple(sorted(pins.items())),
        astuple(rules or ExpertRules()),
        target,
        study,
    )


@st.cache_resource(max_entries=64, show_spinner=False)
def _front(
    digest: str,
    runs: tuple[str, ...],
    metric: str,
    formats: tuple[str, ...],
    pins: tuple[tuple[str, str], ...],
    asked: tuple[Any, ...],
    target: str,
    _study: Study,
) -> tuple[Problem, FrontCache]:
    index, rules = _study.index, ExpertRules(*asked)
    limits = _limits(index, target, formats)
    formats = limits.formats if limits is not None else formats
    ceiling = int(index.bytes_table([parse_format("bf16")]).sum()) * 2
    problem = build_problem(index, _study.tables[metric].select(formats), formats, ceiling, dict(pins), limits, expert_ties(index, rules.ties))  # fmt: skip
    if rules:
        problem = under_rules(problem, index, _study.tables, rules, metric)
    return problem, FrontCache.of(problem)


def _limits(index: ModelIndex, target: str, formats: tuple[str, ...]) -> Limits | None:
    return limits_of(get_target(target), index, formats) if target else None


def unit_of(metric: str) -> str:
    """The unit of a metric's values, for axes."""
    from bitatlas.analysis.metrics import METRICS

    return next((m.UNIT for m in METRICS.values() if metric in m.EMITS), "damage")


def sizes(study: Study) -> dict[str, int]:
    """Allocation id -> weight bytes."""
    return {a.id: a.weights_bytes for a in study.allocations}


def answer(study: Study, asked: Asked, pins: Mapping[str, str]) -> Allocation:
    """The best allocation for a question, under these pins.

    Raises:
        UserError: an impossible budget, or pins that cannot be.
    """
    rules = asked.rules
    problem, _ = front(study, asked.metric, asked.formats, pins, rules, asked.target)
    budget = asked.budget(study.index)
    posed = problem.with_limit(budget.weights_bytes - problem.kept_bytes)
    solution = get_solver("hull").solve(posed)
    provenance = Provenance(model_digest=study.index.digest, model_name=study.index.name,
                            settings={"run": study.tables[asked.metric].run, "formats": list(asked.formats), "solver": "hull", "target": asked.target,
                                      **(rules.settings() if rules else {})})  # fmt: skip
    kv = kv_pairs(study.index, asked.kv) if asked.context else {}
    found = to_allocation(
        posed, solution, study.index, budget=budget, provenance=provenance, kv=pair_names(kv)
    )
    return in_own_bytes(found, study.index)


def keep(study: Study, asked: Asked, pins: Mapping[str, str]) -> None:
    """Store the answer, so that the other pages see it. Solved and certified now, not at every turn of a slider."""
    studies.open_store().put_allocation(answer(study, asked, pins))
    forget()
    st.toast("Kept: see Verify and Export", icon=":material/bookmark:")
