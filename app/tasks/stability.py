"""How stable an allocation is: the same question solved again on other damages that the measurement could have given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from bitatlas.analysis.fisher.matrix import load_probes
from bitatlas.analysis.fisher.resampled import RESAMPLED, resampled_factors
from bitatlas.analysis.schema import NO_FORMAT, Allocation, ModelIndex, SensitivityTable, UserError
from bitatlas.app.expert_rules import ExpertRules, expert_ties, under_rules
from bitatlas.app.side_budgets import SideLimits
from bitatlas.app.tasks.solving import build_problem, expert_evidence
from bitatlas.app.views.compare import Stability
from bitatlas.app.views.words import count
from bitatlas.cache.store import Store
from bitatlas.solvers import SOLVERS, Problem, get_solver
from bitatlas.solvers.stability import error_factors, share_chosen

__all__ = ["solved_again", "stability"]

_REPLICATES, _FEWER, _LARGE = 30, 10, 50_000
"""How often to solve; more units x formats than the last are solved fewer times."""
_SECONDS = 2.0


def stability(store: Store, index: ModelIndex, plan: Allocation) -> Stability:
    """How often each unit of ``plan`` gets its format again, within the same limits, on the plan's own metric.

    Calibration sequences are resampled where the run keeps their numbers, else damages are drawn within their standard
    errors. A plan that no table was solved for has no stability, only the reason why.
    """
    try:
        problem, table = solved_again(store, index, plan)
        factors, how = _factors(store, index, problem, table)
    except UserError as error:
        return Stability(None, _plain(error))
    solver = get_solver(
        str(plan.provenance.settings["solver"]), plan.provenance.settings.get("solver_settings")
    )
    column = {name: j for j, name in enumerate(problem.formats)}
    rows = np.arange(len(problem.units))
    chosen = np.array([column[plan.formats[u]] for u in problem.units])
    first = next(factors)
    known = (np.isfinite(first) | ~problem.allowed | (problem.damage == 0)).all(1)
    pinned = problem.allowed.sum(1) == 1
    if not (known & ~pinned).any():
        return Stability(None, _why_unknown(table.metric))
    try:
        same = solver.solve(problem, time_limit_s=_SECONDS, seed=plan.provenance.seed).choice == chosen
        tables = (problem.damage * np.where(np.isfinite(f), f, 1.0) for f in chain([first], factors))
        share = share_chosen(problem, tables, solver, seed=plan.provenance.seed, time_limit_s=_SECONDS)
    except UserError as error:
        return Stability(None, _plain(error))
    if not same.all():
        how += f" ({count(int((~same).sum()), 'unit')} differ from A already without that)"
    kept = np.where(known | pinned, share[rows, chosen], np.nan)
    return Stability(kept, how, float(kept[known & ~pinned].mean()))


def solved_again(store: Store, index: ModelIndex, plan: Allocation) -> tuple[Problem, SensitivityTable]:
    """The problem that ``plan`` answered, with its pins, ties, rules, limits and target, and its metric's table.

    Raises:
        UserError: nothing to solve again: a search, no metric, a run that is gone.
    """
    settings, name = plan.provenance.settings, str(plan.provenance.settings.get("solver", plan.solver))
    solver = SOLVERS.get(name)
    if solver is None or not settings.get("run") or not settings.get("formats"):
        raise UserError(
            f"{plan.solver or 'A'} did not solve a table of damages, so there is none to solve again"
        )
    if not solver.NEEDS_DAMAGE and not solver.RANKS:
        raise UserError(f"{plan.solver} gives the same bits whatever the damages are")
    if solver.USES_INTERACTION:
        raise UserError(f"{plan.solver} counts pairs of units, which are not resampled")
    if settings.get("target") is True:
        raise UserError("A does not say for which engine it was solved")
    names, limits = tuple(settings["formats"]), None
    metric = str(settings.get("metric") or plan.metric.partition("+")[0])
    table = store.table(str(settings["run"]), metric, index.unit_keys())
    if table.formats == (NO_FORMAT,):
        raise UserError(
            f"{plan.solver} ranks the units by {metric}, which has no damages to solve with again"
        )
    table = table.select(names)
    if settings.get("target"):
        from bitatlas.app.targets import get_target
        from bitatlas.app.targets.limits import limits_of

        limits = limits_of(get_target(str(settings["target"])), index, names)
    rules = ExpertRules.of(settings.get("experts"))
    problem = build_problem(index, table, names, 0, plan.pins, limits, expert_ties(index, rules.ties))
    if rules:
        evidence = expert_evidence(store, index, table)
        problem = under_rules(problem, index, evidence, rules, metric, plan.provenance.seed)
    if side := settings.get("side"):
        more = SideLimits(**side)
        problem = replace(problem, side=(*problem.side, *more.budgets(index, problem.formats)))
    weights = plan.budget.weights_bytes if plan.budget else plan.weights_bytes
    return problem.with_limit(problem.limit_bytes + weights - index.kept_bytes), table


def _factors(
    store: Store, index: ModelIndex, problem: Problem, table: SensitivityTable
) -> tuple[Iterator[np.ndarray], str]:
    """(U, F) factors on the problem's damages, one table a replicate, and in words where they come from."""
    times = _FEWER if problem.damage.size > _LARGE else _REPLICATES
    again = f"{times} times with"
    if table.metric in RESAMPLED:
        try:
            probes = load_probes(store.home.runs(table.run))
        except UserError:
            probes = None  # deleted: the table's own errors are left
        if probes is not None and len(probes.by_sequence[2]) > 1:
            place = {key: i for i, key in enumerate(index.unit_keys())}
            rows = np.array([place[u] for u in probes.units])
            drawn = resampled_factors(probes, table.metric, [index.units[i] for i in rows], times)
            return (_spread(f, rows, probes.formats, problem) for f in drawn), (
                f"{again} the {len(probes.by_sequence[2])} calibration sequences of {table.metric} resampled"
            )
    stderr = _spread(table.stderr, np.arange(len(table.units)), table.formats, problem, np.nan)
    return error_factors(problem.damage, stderr, times), (
        f"{again} damages drawn within their standard errors ({table.metric} keeps nothing of single sequences)"
    )


def _spread(
    values: np.ndarray, rows: np.ndarray, formats: tuple[str, ...], problem: Problem, exact: float = 1.0
) -> np.ndarray:
    """``values`` (u, f) of the units ``rows`` as (U, F) of the problem; NaN where a unit has none, ``exact`` in formats without."""
    out = np.full(problem.damage.shape, np.nan)
    for j, name in enumerate(problem.formats):
        out[rows, j] = values[:, formats.index(name)] if name in formats else exact
    return out


def _plain(error: UserError) -> str:
    return error.what.rstrip(".") + (f" ({error.found})" if error.found else "")


def _why_unknown(metric: str) -> str:
    from bitatlas.analysis.metrics import METRICS

    made = next((m for m in METRICS.values() if metric in m.EMITS), None)
    if made is not None and made.NEEDS == "weights":
        return f"{metric} reads no calibration text"
    return f"{metric} has no standard errors here"
