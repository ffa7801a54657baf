"""Allocation solvers against HiGHS and PuLP + CBC on one machine, in one run.

    python benchmarks/solvers.py [--n 200 2000 20000] [--kinds cvx noncvx moe] [--peers highs cbc] [--limit 60]

CPU seconds (children included), so that a busy machine does not count. Peers get the usual relative tolerance of
1e-4 and their model-building time counts, as ours does. The gap is the value above the relaxation's bound.
Appends one JSON line per case to benchmarks/results/solvers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from bitatlas.solvers import FrontCache, Problem, certify
from bitatlas.solvers.mckp import Mckp

BITS = np.array([2, 3, 4, 5, 6, 8])
SLIDER = 400  # budgets from the smallest allocation to the largest, each asked once
RESULTS = Path(__file__).parent / "results" / "solvers.jsonl"


def make(kind: str, n: int, seed: int = 0) -> Problem:
    """n units x 6 formats at 3.37 code bits on average.

    cvx: any sizes, damage falling fourfold a bit. noncvx: times lognormal(0.35) a cell. moe: as noncvx, 98 % of the
    units of one size.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(100_000, 5_000_000, n)
    if kind == "moe":
        sizes = np.where(rng.random(n) < 0.98, 786_432, rng.choice([1_048_576, 2_097_152, 4_194_304], n))
    size = sizes[:, None] * BITS // 8 + sizes[:, None] // 32
    damage = rng.lognormal(0, 1, (n, 1)) * sizes[:, None] * 4.0**-BITS * 1e-6
    if kind != "cvx":
        damage = damage * rng.lognormal(0, 0.35, damage.shape)
    return Problem.of(damage, size, int((sizes * 3.37 / 8 + sizes / 32).sum()))


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(p.ru_utime + p.ru_stime for p in parts)


def timed(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Least CPU seconds of ``repeats`` runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = cpu_seconds()
        result = run()
        best = min(best, cpu_seconds() - start)
    return best, result


def fresh(problem: Problem) -> Problem:
    """The same problem with nothing cached."""
    return Problem.of(problem.damage, problem.bytes, problem.limit_bytes)


def highs(problem: Problem, limit_s: float) -> np.ndarray | None:
    """SciPy's HiGHS on the 0/1 program; None when it found nothing in its time."""
    n, k = problem.damage.shape
    column = np.arange(n * k)
    one = csr_array((np.ones(n * k), (column // k, column)), shape=(n, n * k))
    extra = problem.bytes - problem.bytes[:, :1]
    room = problem.limit_bytes - int(problem.bytes[:, 0].sum())
    scale = float(extra.max())
    weight = csr_array(extra.ravel()[None] / scale)
    found = milp(
        problem.damage.ravel() / problem.damage.max(),
        constraints=LinearConstraint(
            vstack([one, weight]), np.r_[np.ones(n), -np.inf], np.r_[np.ones(n), room / scale]
        ),
        integrality=np.ones(n * k),
        bounds=Bounds(0, 1),
        options={"time_limit": limit_s, "mip_rel_gap": 1e-4},
    )
    return None if found.x is None else found.x.reshape(n, k).argmax(axis=1)


def cbc(problem: Problem, limit_s: float) -> np.ndarray | None:
    """PuLP with the CBC it brings; None when it found nothing in its time."""
    import pulp

    warnings.simplefilter("ignore", DeprecationWarning)
    n, k = problem.damage.shape
    model = pulp.LpProblem("bits", pulp.LpMinimize)
    x = [[model.add_variable(f"x{i}_{j}", cat=pulp.LpBinary) for j in range(k)] for i in range(n)]
    damage = problem.damage / problem.damage.max()
    extra = (problem.bytes - problem.bytes[:, :1]) / float(problem.bytes.max())
    room = (problem.limit_bytes - int(problem.bytes[:, 0].sum())) / float(problem.bytes.max())
    model += pulp.LpAffineExpression((x[i][j], damage[i, j]) for i in range(n) for j in range(k))
    for row in x:
        model += pulp.LpAffineExpression((v, 1) for v in row) == 1
    model += pulp.LpAffineExpression((x[i][j], extra[i, j]) for i in range(n) for j in range(k)) <= room
    model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=limit_s, gapRel=1e-4, threads=1))
    values = [[v.value() for v in row] for row in x]
    return None if values[0][0] is None else np.array(values, float).argmax(axis=1)


PEERS: dict[str, Callable[[Problem, float], np.ndarray | None]] = {"highs": highs, "cbc": cbc}


def case(kind: str, n: int, peers: list[str], limit_s: float) -> dict[str, Any]:
    """Everything measured for one problem."""
    problem = make(kind, n)
    front_s, cache = timed(lambda: FrontCache.of(fresh(problem)), 5)
    limits = np.linspace(problem.min_bytes, int(problem.bytes[:, -1].sum()), SLIDER).astype(np.int64)
    cache.at(int(limits[0]))
    slider = [timed(lambda limit=limit: cache.at(int(limit)))[0] * 1e3 for limit in limits]
    low, middle, high = np.quantile(slider, [0.2, 0.5, 0.8])
    exact_s, found = timed(lambda: Mckp()._solve(fresh(problem), 0, time.perf_counter() + limit_s), 3)
    proof_s, proof = timed(lambda: certify(problem, found.choice))
    row: dict[str, Any] = {
        "kind": kind, "n": n, "formats": len(BITS),
        "front_ms": front_s * 1e3, "slider_ms_p20": low, "slider_ms_p50": middle, "slider_ms_p80": high,
        "slider_ms_max": max(slider), "exact_ms": exact_s * 1e3,
        "exact_status": found.status, "exact_gap": proof.gap, "certificate_ms": proof_s * 1e3,
        "hull_gap": (cache.at(problem.limit_bytes).objective - proof.lower_bound) / proof.objective,
    }  # fmt: skip
    for peer in peers:
        seconds, choice = timed(lambda peer=peer: PEERS[peer](problem, limit_s))
        row[f"{peer}_s"] = seconds
        other = certify(problem, choice) if choice is not None else None
        ok = other is not None and other.feasible
        row[f"{peer}_gap"] = other.gap if other is not None and ok else None
        row[f"{peer}_over_exact"] = seconds / exact_s
        row[f"{peer}_over_front"] = seconds / front_s
    return row


def main() -> None:
    """Run the cases, print and append them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[200, 2000, 20_000])
    parser.add_argument("--kinds", nargs="+", default=["cvx", "noncvx", "moe"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each peer and case")
    args = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__,
        "peer_limit_s": args.limit, "threads": os.environ.get("OMP_NUM_THREADS", ""), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    for n in args.n:
        for kind in args.kinds:
            row = case(kind, n, args.peers, args.limit)
            print(
                json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
            with RESULTS.open("a") as out:
                out.write(json.dumps({**about, **row}) + "\n")


if __name__ == "__main__":
    main()
