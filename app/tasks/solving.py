"""Deciding: a table, a budget, a solver -> an allocation or a front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitatlas.analysis.schema import (
    NO_FORMAT,
    SOLVE_BY_DEFAULT,
    Allocation,
    Budget,
    Frontier,
    ModelIndex,
    Provenance,
    SensitivityTable,
    TieGroup,
    UserError,
    is_kv_metric,
    parse_format,
    resolve_pins,
)
from bitatlas.app.budgets import reserve_bytes, resolve_budget, too_small
from bitatlas.app.checks import at_least, check_seed
from bitatlas.app.expert_groups import EVIDENCE
from bitatlas.app.expert_rules import ExpertRules, expert_ties, under_rules
from bitatlas.app.fronts import kept_front
from bitatlas.app.kv_plan import cache_pairs, pair_names
from bitatlas.app.side_budgets import SideLimits
from bitatlas.app.sizes import parse_bytes
from bitatlas.app.tasks.formats_to_solve import formats_to_solve
from bitatlas.app.tasks.interaction import with_probes
from bitatlas.app.tasks.joint import find_kv_table, joint_front, solve_joint
from bitatlas.app.tasks.models import register
from bitatlas.cache.paths import Home, write_output
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, Solver, get_solver, to_allocation

if TYPE_CHECKING:
    from bitatlas.app.targets.limits import Limits

__all__ = [
    "build_problem", "default_metric", "evidence_runs", "expert_evidence", "find_table", "frontier", "in_own_bytes", "read_allocation",
    "solve",
]  # fmt: skip


def find_table(
    store: Store, index: ModelIndex, metric: str, formats: tuple[str, ...], quantizer: str = ""
) -> SensitivityTable:
    """The newest finished measurement of ``metric`` that covers ``formats``, or that does not depend on them.

    ``quantizer``: only one that rounded with this; "" = the newest.

    Raises:
        UserError: never measured, or not for these formats.
    """
    if is_kv_metric(metric):
        raise UserError(
            f"{metric} is about the KV cache, not about weights",
            fix="--metric fisher, and --kv for the cache",
        )
    run = store.latest_run(index.digest, metric, formats, quantizer)
    if run is None and quantizer and store.latest_run(index.digest, metric, formats):
        raise UserError(f"{metric} has not been measured with {quantizer}",
                        fix=f"bitatlas measure {index.path} --metric {metric} --formats {','.join(formats)} --set quantizer={quantizer} --wait")  # fmt: skip
    if run is None:
        known = sorted({e.metric for e in store.metrics_of(index.digest)})
        raise UserError(
            f"{metric} has not been measured for {index.name} in these formats",
            found=f"measured: {', '.join(known) or 'nothing'}",
            fix=f"bitatlas measure {index.path} --metric {metric} --formats {','.join(formats)} --wait",
        )
    table = store.table(run, metric, index.unit_keys())
    return table if table.formats == (NO_FORMAT,) else table.select(formats)


def default_metric(store: Store, index: ModelIndex, formats: tuple[str, ...]) -> str:
    """What is solved with where no damage is named: the first of `SOLVE_BY_DEFAULT` that was measured."""
    return next((m for m in SOLVE_BY_DEFAULT if store.latest_run(index.digest, m, formats)), "fisher")


def build_problem(
    index: ModelIndex,
    table: SensitivityTable | None,
    formats: tuple[str, ...],
    limit_bytes: int,
    pins: dict[str, str],
    limits: Limits | None = None,
    ties: tuple[TieGroup, ...] = (),
    algorithm: Solver | None = None,
) -> Problem:
    """The solvers' problem; formats that only pins use become columns of their own.

    ``limits`` of an engine add its ties, pins where it takes none of the formats (pins by hand come first), and the bytes
    of its own container: the budget holds there too. ``ties`` are the user's own. For an ``algorithm`` that ranks units a
    metric without formats becomes their score.
    """
    if table is not None and algorithm is not None and algorithm.RANKS and table.formats == (NO_FORMAT,):
        return build_problem(index, None, formats, limit_bytes, pins, limits, ties).with_score(table)
    wanted = tuple(parse_format(f) for f in formats)
    if limits is None:
        return Problem.build(index, table, wanted, limit_bytes, pins=pins, ties=ties)
    problem = Problem.build(
        index, table, wanted, limit_bytes, pins={**limits.pins, **pins}, ties=(*limits.ties, *ties)
    )
    mask = limits.mask(index, problem.formats, free=tuple(pins))
    more = max(0, limits.target.kept_bytes(index) - index.kept_bytes)

    def column(name: str) -> tuple[np.ndarray, np.ndarray]:
        return limits.bytes(index, (name,))[:, 0], limits.mask(index, (name,))[:, 0]

    return replace(
        problem,
        allowed=problem.allowed & mask,
        bytes=limits.bytes(index, problem.formats),
        limit_bytes=limit_bytes - more,
        kept_bytes=index.kept_bytes + more,
        engine=limits.target.NAME,
        engine_pins=frozenset(limits.pins.keys() - pins.keys()),
        more_formats=column,
    )


def evidence_runs(store: Store, index: ModelIndex) -> dict[str, str]:
    """Name -> newest run of everything beside the damage that groups of experts are made of."""
    found = ((name, store.latest_run(index.digest, name)) for name in EVIDENCE)
    return {name: run for name, run in found if run is not None}


def expert_evidence(
    store: Store, index: ModelIndex, table: SensitivityTable | None, runs: Mapping[str, str] | None = None
) -> dict[str, SensitivityTable]:
    """What is known about experts: the damage, and the tables of `evidence_runs`, or of those ``runs`` that a job wrote down."""
    out = {table.metric: table} if table is not None else {}
    for name, run in (evidence_runs(store, index) if runs is None else runs).items():
        out[name] = store.table(run, name, index.unit_keys())
    return out


def _prepare(
    model: str | Path,
    metric: str,
    formats: str | tuple[str, ...] | None,
    pins: list[str],
    target: str | None,
    algorithm: Solver,
    quantizer: str = "",
) -> tuple[Store, ModelIndex, str, SensitivityTable | None, tuple[str, ...], dict[str, str], Limits | None]:
    index = register(model)
    store = Store(Home.default())
    metrics = (metric,) if metric else tuple(algorithm.METRICS) or SOLVE_BY_DEFAULT
    needs = algorithm.NEEDS_DAMAGE or bool(algorithm.METRICS)
    names, limits = formats_to_solve(store, index, formats, target, metrics, needs)
    pinned = resolve_pins(pins, index.unit_keys())
    if not metric and algorithm.METRICS:
        known = (m for m in algorithm.METRICS if store.latest_run(index.digest, m, names))
        metric = next(known, algorithm.METRICS[0])
    metric = metric or default_metric(store, index, names)
    table = None
    # A rule that needs no damage is still told it where it is known, so that its prediction can be shown.
    if needs or store.latest_run(index.digest, metric, names) is not None:
        table = find_table(store, index, metric, names, quantizer)
    return store, index, metric, table, names, pinned, limits


def solve(
    model: str | Path,
    *,
    metric: str = "",
    solver: str = "",
    bits: float | None = None,
    bytes_: str | int | None = None,
    fit: str | int | None = None,
    context: int = 0,
    batch: int = 1,
    kv_bits: float = 16,
    kv_plan: str = "",
    kv: bool = False,
    kv_metric: str = "",
    reserve: str | int = "256MiB",
    formats: str | tuple[str, ...] | None = None,
    pins: list[str] | None = None,
    target: str | None = None,
    seed: int = 0,
    latency_ms: float | None = None,
    bops: float | None = None,
    active_bytes: str | int | None = None,
    experts: ExpertRules | None = None,
    quantizer: str = "",
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Allocation:
    """The best allocation that a solver finds within a budget; stored, and written to ``output`` when named.

    ``solver``: by default `mckp`; `ilp` where further limits hold, `hull` where only groups are limited.
    ``formats``: by default int{2,3,4,5,6,8}-g64; with ``target`` those that were measured and that it stores as planned.
    ``metric``: a measured damage; by default ``fisher_anchored``, ``fisher_scaled`` or ``fisher``, the first that was measured, or
    what the solver is published with. `threshold` also takes metrics that do not depend on the format, such as ``lim`` and ``zd``.
    ``kv``: K and V of every layer get formats too, under the same ``fit`` budget; ``kv_bits`` gives all layers the same,
    ``kv_plan`` each its own (`app.kv_plan`).
    Further limits hold beside the bytes (`app.side_budgets`): ``latency_ms`` of one decoding step of ``batch`` sequences by the
    kernel table of this machine, ``bops`` per token (in 10^9), ``active_bytes`` read per step.
    ``experts``: limits on groups of experts, floors for rare ones, ties among them (`app.expert_rules`).
    ``quantizer``: only a measurement that rounded with this one; by default the newest of any.
    ``settings``: of the solver, such as ``{"exact": False}`` for `kvtuner` (`bitatlas solvers` lists them).

    Raises:
        UserError: not measured, an unknown quantiser, impossible budget (names the smallest possible one), a pin that matches nothing.
    """
    check_seed(seed)
    at_least("context", context, 0)
    at_least("batch", batch, 1)
    if quantizer:
        from bitatlas.app.work.pack import check_quantizer

        check_quantizer(quantizer)
    if kv and (fit is None or kv_bits != 16 or kv_plan):
        raise UserError("weights and KV cache share a budget of memory", found="--kv-bits or --kv-plan as well" if fit else "no --fit",
                        fix="--fit 8GiB --context 8192 --kv, without these")  # fmt: skip
    asked = (latency_ms, bops, active_bytes) != (None, None, None)
    if asked and kv:
        raise UserError(
            "further limits are for the weights alone", found="--kv as well", fix="leave out --kv"
        )
    rules = experts or ExpertRules()
    solver = solver or ("ilp" if asked else "hull" if rules.limits else "mckp")
    algorithm = get_solver(solver, settings)
    store, index, metric, table, names, pinned, limits = _prepare(
        model, metric, formats, pins or [], target, algorithm, quantizer
    )
    problem = build_problem(index, table, names, 0, pinned, limits, expert_ties(index, rules.ties), algorithm)
    if rules:
        problem = under_rules(problem, index, expert_evidence(store, index, table), rules, metric, seed)
    if kv and fit is not None:
        problem = with_probes(problem, table, algorithm)
        cache = find_kv_table(store, index, kv_metric)
        allocation = solve_joint(
            index, problem, cache, total_bytes=parse_bytes(fit), reserve_bytes=reserve_bytes(reserve), context=context,
            batch=batch, solver=solver, settings=settings, seed=seed,
            provenance=_provenance(index, table, names, solver, limits, seed, metric=metric, kv_run=cache.run, **_told(settings), **(rules.settings() if rules else {})),
        )  # fmt: skip
    else:
        same = cache_pairs(index, kv_bits, kv_plan)
        budget = resolve_budget(index, bits=bits, bytes_=bytes_, fit=fit, context=context, batch=batch,
                                reserve=reserve, kv=same, smallest=problem.min_bytes - problem.limit_bytes + index.kept_bytes)  # fmt: skip
        side = SideLimits(latency_ms, bops, active_bytes, batch) if asked else None
        asked_for = problem.with_limit(problem.limit_bytes + budget.weights_bytes - index.kept_bytes)
        if asked_for.min_bytes > asked_for.limit_bytes:
            raise too_small(asked_for, budget)
        allocation = _solved(
            asked_for, index, table, names, budget, solver, limits, seed, side, rules, settings
        )
        allocation = replace(allocation, kv=pair_names(same))
    store.put_allocation(allocation)
    if output is not None:
        write_output(output, allocation.to_json().encode())
    return allocation


def solve_table(
    index: ModelIndex,
    table: SensitivityTable | None,
    formats: tuple[str, ...],
    budget: Budget,
    solver: str,
    pins: dict[str, str],
    limits: Limits | None = None,
    seed: int = 0,
    side: SideLimits | None = None,
) -> Allocation:
    """`solve` without the store: what a page calls while a slider moves."""
    limit = budget.weights_bytes - index.kept_bytes
    problem = build_problem(index, table, formats, limit, pins, limits, algorithm=get_solver(solver))
    return _solved(problem, index, table, formats, budget, solver, limits, seed, side)


def _solved(
    problem: Problem, index: ModelIndex, table: SensitivityTable | None, formats: tuple[str, ...], budget: Budget, solver: str,
    limits: Limits | None, seed: int, side: SideLimits | None, rules: ExpertRules | None = None, settings: Mapping[str, Any] | None = None,
) -> Allocation:  # fmt: skip
    if side is not None:
        problem = replace(problem, side=(*problem.side, *side.budgets(index, problem.formats)))
    algorithm = get_solver(solver, settings)
    solution = algorithm.solve(with_probes(problem, table, algorithm), seed=seed)
    more = (
        _told(settings) | (side.settings() if side is not None else {}) | (rules.settings() if rules else {})
    )
    provenance = _provenance(index, table, formats, solver, limits, seed, **more)
    return in_own_bytes(to_allocation(problem, solution, index, budget=budget, provenance=provenance), index)


def _told(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"solver_settings": dict(settings)} if settings else {}


def in_own_bytes(allocation: Allocation, index: ModelIndex) -> Allocation:
    """The allocation with the size of its own formats, where the problem counted an engine's."""
    payload = sum(parse_format(allocation.formats[u.key]).payload_bytes(u.rows, u.cols) for u in index.units)
    return replace(allocation, payload_bytes=payload, bits_per_weight=payload * 8 / max(index.params, 1))


def _provenance(
    index: ModelIndex, table: SensitivityTable | None, formats: tuple[str, ...], solver: str, limits: Limits | None,
    seed: int, **more: Any,
) -> Provenance:  # fmt: skip
    settings = {
        "run": table.run if table else "",
        "formats": list(formats),
        "solver": solver,
        "target": limits.target.NAME if limits is not None else "",
    }
    return Provenance(model_digest=index.digest, model_name=index.name, seed=seed, settings=settings | more)


def frontier(
    model: str | Path,
    *,
    metric: str = "",
    solver: str = "hull",
    formats: str | tuple[str, ...] | None = None,
    pins: list[str] | None = None,
    target: str | None = None,
    points: int = 64,
    experts: ExpertRules | None = None,
    kv: bool = False,
    kv_metric: str = "",
    context: int = 0,
    batch: int = 1,
) -> Frontier:
    """The best predicted damage at every size, cheapest first, under the rules for experts; at most ``points`` of them; stored, and the
    same question is answered from the store.

    ``kv``: of weights and K/V pairs together, the cache holding ``context`` tokens of ``batch`` sequences (`joint_front`).

    Raises:
        UserError: fewer than two points (a front has two ends), not measured, a pin that matches nothing, a cache of unknown size.
    """
    at_least("number of points", points, 2)
    at_least("context", context, 0)
    at_least("batch", batch, 1)
    if not kv and (context or batch != 1 or kv_metric):
        raise UserError(
            "a front of weights alone has no KV cache",
            found="a context, a batch or a KV metric",
            fix="--kv as well",
        )
    algorithm, rules = get_solver(solver), experts or ExpertRules()
    store, index, metric, table, names, pinned, limits = _prepare(
        model, metric, formats, pins or [], target, algorithm
    )
    fmts = [parse_format(f) for f in names]
    sizes = index.bytes_table(fmts) if limits is None else limits.bytes(index, (*names, "bf16"))
    ceiling = int(sizes.max(axis=1).sum())
    problem = build_problem(
        index, table, names, ceiling, pinned, limits, expert_ties(index, rules.ties), algorithm
    )
    if rules:
        problem = under_rules(problem, index, expert_evidence(store, index, table), rules, metric)
    run = table.run if table else ""
    if kv:
        return joint_front(
            store, index, problem, find_kv_table(store, index, kv_metric), algorithm, run=run, context=context, batch=batch,
            points=points, prepare=lambda p: with_probes(p, table, algorithm),
        )  # fmt: skip
    return kept_front(
        store, index.digest, run, problem, algorithm, points=points, prepare=lambda p: with_probes(p, table, algorithm)
    )  # fmt: skip


def read_allocation(path: str | Path) -> Allocation:
    """An allocation file.

    Raises:
        UserError: missing, too large, or not an allocation.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            "there is no such allocation file",
            found=str(path),
            fix="make one with `bitatlas solve … -o allocation.json`",
        )
    if path.stat().st_size > 64 << 20:
        raise UserError("the allocation file is too large to be one", found=f"{path.stat().st_size} bytes")
    try:
        return Allocation.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError("the allocation file is not text", found=str(error)) from None
