"""What the Fit page keeps between reruns: the front of a problem, so that the slider only looks up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import streamlit as st

from bitatlas.analysis.schema import Allocation, Provenance, parse_format
from bitatlas.app import studies
from bitatlas.app.expert_rules import ExpertRules, expert_ties, under_rules
from bitatlas.app.kv_plan import kv_pairs, pair_names
from bitatlas.app.studies import Study
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
) -> tuple[Problem, FrontCache]:
    """The problem and its whole front; solved once per (table, formats, pins, rules), shared by all sessions.

    Raises:
        UserError: pins, formats or rules for experts that cannot be.
    """
    runs = tuple(t.run for t in study.tables.values())
    return _front(
        study.index.digest,
        runs,
        metric,
        formats,
        tuple(sorted(pins.items())),
        astuple(rules or ExpertRules()),
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
    _study: Study,
) -> tuple[Problem, FrontCache]:
    table = _study.tables[metric].select(formats)
    ceiling = int(_study.index.bytes_table([parse_format("bf16")]).sum()) * 2
    rules = ExpertRules(*asked)
    problem = Problem.build(
        _study.index, table, formats, ceiling, pins=dict(pins), ties=expert_ties(_study.index, rules.ties)
    )
    if rules:
        problem = under_rules(problem, _study.index, _study.tables, rules, metric)
    return problem, FrontCache.of(problem)


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
    problem, _ = front(study, asked.metric, asked.formats, pins)
    budget = asked.budget(study.index)
    posed = problem.with_limit(budget.weights_bytes - study.index.kept_bytes)
    solution = get_solver("hull").solve(posed)
    provenance = Provenance(model_digest=study.index.digest, model_name=study.index.name,
                            settings={"run": study.tables[asked.metric].run, "formats": list(asked.formats), "solver": "hull"})  # fmt: skip
    kv = kv_pairs(study.index, asked.kv) if asked.context else {}
    return to_allocation(
        posed, solution, study.index, budget=budget, provenance=provenance, kv=pair_names(kv)
    )


def keep(study: Study, asked: Asked, pins: Mapping[str, str]) -> None:
    """Store the answer, so that the other pages see it. Solved and certified now, not at every turn of a slider."""
    studies.open_store().put_allocation(answer(study, asked, pins))
    forget()
    st.toast("Kept: see Verify and Export", icon=":material/bookmark:")
