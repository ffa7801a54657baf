"""One memory budget for weights and KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bitatlas.analysis.schema import (
    KV_DAMAGES,
    Allocation,
    Budget,
    Frontier,
    KvTable,
    ModelIndex,
    Provenance,
    UserError,
)
from bitatlas.app.fronts import kept_front
from bitatlas.app.sizes import format_bytes
from bitatlas.app.studies import kv_table
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, Solver, get_solver, to_allocation
from bitatlas.solvers.joint import JointProblem, join_kv

__all__ = ["find_kv_table", "joint_front", "solve_joint"]


def find_kv_table(store: Store, index: ModelIndex, metric: str = "") -> KvTable:
    """The newest finished measurement of a KV metric, by layer and pair; by default of the first of `KV_DAMAGES` that there is.

    Raises:
        UserError: never measured, or a metric whose unit is not that of the weights' damage.
    """
    if not metric:
        metric = next((m for m in KV_DAMAGES if store.latest_run(index.digest, m)), KV_DAMAGES[0])
    if metric not in KV_DAMAGES:
        raise UserError(f"{metric} cannot be added to the damage of weights", found="its unit is not nats per token",
                        fix=f"--kv-metric {' or '.join(KV_DAMAGES)}")  # fmt: skip
    run = store.latest_run(index.digest, metric)
    table = kv_table(store, store.run(run), metric) if run else None
    if table is None:
        raise UserError(f"{metric} has not been measured for {index.name}",
                        fix=f"bitatlas measure {index.path} --metric {metric} --seq-len 256 --wait")  # fmt: skip
    return table


def solve_joint(
    index: ModelIndex,
    weights: Problem,
    cache: KvTable,
    *,
    total_bytes: int,
    reserve_bytes: int,
    context: int,
    batch: int,
    solver: str = "mckp",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    provenance: Provenance | None = None,
) -> Allocation:
    """Weights and K/V pairs within ``total_bytes`` less the reserve; ``predicted`` is the damage of both together.

    Args:
        weights: the weights' problem; its own limit does not count.
        cache: damage of the pairs, nats per token.
        context, batch: tokens and sequences that the cache must hold.

    Raises:
        UserError: no context, an unknown geometry, or an impossible budget.
    """
    limit = total_bytes - reserve_bytes - weights.kept_bytes
    joint = _joined(index, weights, cache, context, batch, limit)
    smallest = joint.problem.min_bytes
    if smallest > limit:
        raise UserError(
            f"{format_bytes(total_bytes)} is too small for the weights and the KV cache together",
            found=f"the smallest formats take {format_bytes(smallest + weights.kept_bytes + reserve_bytes)}",
            fix="a shorter --context, a smaller --batch, smaller formats, or more memory",
        )
    solution = get_solver(solver, settings).solve(joint.problem, seed=seed)
    choice, plan = joint.split(solution.choice)
    payload, kv_bytes = joint.spent(solution.choice)
    label = f"{format_bytes(total_bytes)}, context {context}, batch {batch}, weights and KV cache together"
    budget = Budget(total_bytes - reserve_bytes - kv_bytes, kv_bytes, reserve_bytes, context, batch, label)
    whole = to_allocation(joint.problem, solution, index, budget=budget, provenance=provenance)
    return replace(
        whole,
        formats={u: weights.formats[j] for u, j in zip(weights.units, choice.tolist())},
        payload_bytes=payload,
        pins={u: f for u, f in weights.pins.items() if u not in weights.engine_pins},
        bits_per_weight=payload * 8 / max(index.params, 1),
        metric=f"{weights.metric}+{cache.metric}",
        kv={layer: (pair.k.name, pair.v.name) for layer, pair in plan.items() if pair.name != "kv16/kv16"},
        kv_block=cache.layout.block,
        kv_residual=cache.layout.residual,
    )


def joint_front(
    store: Store,
    index: ModelIndex,
    weights: Problem,
    cache: KvTable,
    solver: Solver,
    *,
    run: str,
    context: int,
    batch: int,
    points: int = 64,
    prepare: Callable[[Problem], Problem] | None = None,
) -> Frontier:
    """The front of weights and K/V pairs together: least damage of both over the bytes of both, and how they share them.

    The same question is answered from the store.

    Args:
        weights, cache, context, batch: as in `solve_joint`. run: of the weights' damage.
        prepare: completes the weights' problem for solving, where that is dear.

    Returns:
        A front over the weights' units and ``kv.L`` with ``kv_bytes``; kept tensors are in neither number.

    Raises:
        UserError: no context, an unknown geometry; or from the solver.
    """
    joint = _joined(index, weights, cache, context, batch)
    metric = f"{weights.metric}+{cache.metric}"

    def posed(_: Problem) -> Problem:
        ready = _joined(index, prepare(weights), cache, context, batch) if prepare else joint
        return replace(ready.problem, metric=metric)

    def shared(front: Frontier) -> Frontier:
        taken = [joint.spent(choice.astype(np.int64))[1] for choice in front.choice]
        return replace(front, kv_bytes=np.array(taken, np.int64))

    return kept_front(
        store, index.digest, run, replace(joint.problem, metric=metric), solver, points=points, prepare=posed, complete=shared
    )  # fmt: skip


def _joined(
    index: ModelIndex, weights: Problem, cache: KvTable, context: int, batch: int, limit_bytes: int = 0
) -> JointProblem:
    """Weights and pairs as one problem.

    Raises:
        UserError: no context, or an unknown geometry.
    """
    if index.kv is None or context < 1:
        raise UserError("a joint budget needs to know how large the KV cache is",
                        found="config.json gives no heads and head size" if index.kv is None else "no context length",
                        fix="use --bytes" if index.kv is None else "--context 8192")  # fmt: skip
    return join_kv(weights, index.kv, cache.formats(), cache.damage, context=context, batch=batch,
                   layout=cache.layout, limit_bytes=limit_bytes)  # fmt: skip
