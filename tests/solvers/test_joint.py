from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitatlas.analysis.schema import KvGeometry, KvLayout, KvTable, parse_pair
from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.joint import join_kv, kv_bytes, kv_problem

PAIRS = [parse_pair(p) for p in ("kv8-token", "kv8-channel/kv4-token", "kv4-token", "kv4-channel/kv2-token")]
LAYOUT = KvLayout()
# Layer 1 keeps no cache; layer 2 has a sliding window.
GEOMETRY = KvGeometry(heads=(4, 0, 2), head_dim=16, windows=(0, 0, 32))


def _weights(seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    bits = np.array([2, 4, 8])
    return Problem.of(rng.lognormal(0, 1, (5, 1)) * 4.0**-bits, rng.integers(100, 400, (5, 1)) * bits, 0,
                      units=[f"w{i}" for i in range(5)], formats=["i2", "i4", "i8"], params=np.full(5, 100))  # fmt: skip


def _kv_damage(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(-3, 1, (2, 1)) * np.array([0.1, 0.4, 1.0, 4.0])


def test_bytes_of_the_cache_add_up_to_the_geometry_s():
    layers, size = kv_bytes(GEOMETRY, PAIRS, 100, 2, LAYOUT)
    assert layers == (0, 2)
    for p, pair in enumerate(PAIRS):
        assert size[:, p].sum() == GEOMETRY.plan_bytes(dict.fromkeys(layers, pair), 100, 2, LAYOUT)
    whole = parse_pair("kv16")
    assert kv_bytes(GEOMETRY, [whole], 100, 2, LAYOUT)[1].sum() == GEOMETRY.cache_bytes(100, 2)


@pytest.mark.parametrize("seed", range(6))
def test_joint_optimum_is_the_best_of_all_splits(seed):
    weights, damage = _weights(seed), _kv_damage(seed)
    _, size = kv_bytes(GEOMETRY, PAIRS, 64, 1, LAYOUT)
    limit = int(weights.min_bytes + size.min(axis=1).sum() + 5000)
    joint = join_kv(weights, GEOMETRY, PAIRS, damage, context=64, limit_bytes=limit)
    solution = get_solver("mckp").solve(joint.problem)
    best = np.inf
    for w in itertools.product(range(3), repeat=5):
        payload = weights.payload(np.array(w))
        for kv in itertools.product(range(4), repeat=2):
            if payload + size[[0, 1], list(kv)].sum() <= limit:
                best = min(best, weights.objective(np.array(w)) + damage[[0, 1], list(kv)].sum())
    assert solution.certificate.objective == pytest.approx(best)
    mine, cache = joint.split(solution.choice)
    assert set(cache) == {0, 2}
    assert all(pair in PAIRS for pair in cache.values())
    weight_bytes, cache_bytes = joint.spent(solution.choice)
    assert weight_bytes == weights.payload(mine)
    assert weight_bytes + cache_bytes == solution.certificate.payload_bytes <= limit


def test_never_worse_than_a_fixed_cache():
    weights, damage = _weights(1), _kv_damage(1)
    _, size = kv_bytes(GEOMETRY, PAIRS, 64, 1, LAYOUT)
    limit = int(weights.min_bytes + size.max(axis=1).sum() + 800)
    joint = join_kv(weights, GEOMETRY, PAIRS, damage, context=64, limit_bytes=limit)
    together = get_solver("mckp").solve(joint.problem).certificate.objective
    for p in range(len(PAIRS)):
        left = limit - int(size[:, p].sum())
        alone = get_solver("mckp").solve(weights.with_limit(left)).certificate.objective + damage[:, p].sum()
        assert together <= alone + 1e-12


def test_every_solver_that_sums_damages_takes_the_joint_problem():
    joint = join_kv(_weights(2), GEOMETRY, PAIRS, _kv_damage(2), context=64, limit_bytes=24_000)
    best = get_solver("mckp").solve(joint.problem).certificate.objective
    for name in ("hull", "ilp", "baq", "bisection", "random_best", "first_last"):
        assert get_solver(name).solve(joint.problem).certificate.objective >= best - 1e-12


def test_pins_and_interactions_carry_over():
    rng = np.random.default_rng(0)
    base = _weights()
    a = rng.normal(size=(6, 5, 3)) * 2.0 ** -np.array([2, 4, 8])
    weights = Problem.of((a**2).mean(axis=0), base.bytes, 0, units=base.units, formats=base.formats,
                         pins={"w1": "i8"}, interaction=a)  # fmt: skip
    joint = join_kv(weights, GEOMETRY, PAIRS, _kv_damage(), context=64, limit_bytes=24_000)
    solution = get_solver("projection_descent").solve(joint.problem)
    mine, cache = joint.split(solution.choice)
    assert mine[1] == 2
    expected = weights.quadratic(mine) + sum(
        _kv_damage()[[0, 2].index(layer), PAIRS.index(pair)] for layer, pair in cache.items()
    )
    assert solution.certificate.quadratic == pytest.approx(expected)


def test_the_cache_alone_takes_any_solver():
    table = KvTable("kv_fisher", (0, 2), tuple(p.name for p in PAIRS), _kv_damage(), np.zeros((2, 4)))
    _, size = kv_bytes(GEOMETRY, PAIRS, 4096, 1, LAYOUT)
    limit = int(size.min(1).sum() + (size.max(1) - size.min(1)).sum() // 2)
    problem = kv_problem(table, GEOMETRY, context=4096, batch=1, limit_bytes=limit)
    best = min(table.damage[0, a] + table.damage[1, b] for a in range(4) for b in range(4)
               if size[0, a] + size[1, b] <= limit)  # fmt: skip
    assert get_solver("mckp").solve(problem).certificate.objective == pytest.approx(best)
    with pytest.raises(ValueError, match="caches"):
        kv_problem(
            KvTable("m", (0, 1), table.pairs, table.damage, table.stderr),
            GEOMETRY,
            context=9,
            batch=1,
            limit_bytes=9,
        )


def test_wrong_table():
    with pytest.raises(ValueError, match="KV damage"):
        join_kv(_weights(), GEOMETRY, PAIRS, np.ones((3, 4)), context=64, limit_bytes=1)
