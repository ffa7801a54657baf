from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import pack_names
from bitatlas.analysis.schema import SensitivityTable, UserError
from bitatlas.app.tasks.interaction import with_probes
from bitatlas.cache.paths import Home
from bitatlas.solvers import Problem, get_solver

UNITS, FORMATS = ("a", "b", "c"), ("int2-g64", "int4-g64")
PROBES, TOKENS = 8, 32


@pytest.fixture
def home(tmp_path):
    """A home with the part files of one run: two chunks of four sequences."""
    rng = np.random.default_rng(0)
    home = Home(tmp_path)
    for chunk in range(2):
        np.savez(
            home.runs("run1") / f"{chunk}.npz",
            a=rng.normal(size=(4, 3, 2)).astype(np.float32),
            gsq=np.ones((4, 3)),
            reached=np.full((4, 3), TOKENS),
            sequence=np.arange(4) + 4 * chunk,
            tokens=np.full(4, TOKENS),
            norm_sq=np.ones((3, 2)),
            names=pack_names(UNITS, FORMATS),
        )
    return home


def _table(run: str) -> SensitivityTable:
    damage = np.array([[4.0, 1.0], [5.0, 2.0], [6.0, 3.0]])
    return SensitivityTable("fisher", UNITS, FORMATS, damage, damage, np.ones((3, 2), int), run=run)


def _problem(units=UNITS, formats=FORMATS) -> Problem:
    table = _table("run1")
    damage = np.column_stack(
        [table.damage[:, FORMATS.index(f)] if f in FORMATS else np.zeros(3) for f in formats]
    )
    return Problem.of(
        damage, np.tile(np.arange(2, 2 + len(formats)), (3, 1)), 8, units=units, formats=formats
    )


def test_probes_follow_the_problem_s_order(home):
    raw = np.concatenate([np.load(home.runs("run1") / f"{i}.npz")["a"] for i in range(2)])
    problem = with_probes(
        _problem(("c", "a", "b"), ("int4-g64", "int2-g64", "bf16")),
        _table("run1"),
        get_solver("projection_descent"),
        home,
    )
    assert problem.interaction.shape == (PROBES, 3, 3)
    assert np.array_equal(problem.interaction[:, 0, 0], raw[:, 2, 1])
    assert np.array_equal(problem.interaction[:, 1, 1], raw[:, 0, 0])
    assert (problem.interaction[:, :, 2] == 0).all()
    assert problem.interaction_scale == pytest.approx(1 / (2 * TOKENS))
    assert 0 <= problem.shrinkage <= 1
    solution = get_solver("projection_descent").solve(problem)
    assert np.isfinite(solution.certificate.quadratic)


def test_other_solvers_get_their_problem_unchanged(home):
    problem = _problem()
    assert with_probes(problem, _table("run1"), get_solver("mckp"), home) is problem


def test_a_run_without_probes(home):
    with pytest.raises(UserError, match="needs the probes"):
        with_probes(_problem(), _table("other"), get_solver("projection_descent"), home)


def test_a_format_without_probes(home):
    with pytest.raises(UserError, match="do not cover"):
        with_probes(
            _problem(formats=("int2-g64", "int3-g64")), _table("run1"), get_solver("projection_descent"), home
        )
