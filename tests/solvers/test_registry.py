from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bitatlas.solvers
from bitatlas.analysis.schema import UserError
from bitatlas.solvers import SOLVERS, STATUSES, Problem, Solver, get_solver


def test_names_and_capabilities():
    for name, solver in SOLVERS.items():
        assert name == solver.NAME
        assert issubclass(solver, Solver)
        for flag in ("EXACT", "FRONT", "HANDLES_TIES", "NEEDS_DAMAGE", "MULTI_BUDGET", "USES_INTERACTION"):
            assert isinstance(getattr(solver, flag), bool)


def test_every_solver_has_a_conformance_test():
    here = Path(__file__).parent
    text = "\n".join(p.read_text() for p in here.glob("test_*.py"))
    for solver in SOLVERS.values():
        assert f"return {solver.__name__}(" in text, solver.__name__


def test_near_names():
    assert get_solver(" MCKP ").NAME == "mckp"
    with pytest.raises(UserError, match="nearest: hull"):
        get_solver("hul")
    with pytest.raises(UserError, match="bitatlas search --solver path"):
        get_solver("path")


def test_a_second_budget_needs_a_solver_that_knows_it():
    from bitatlas.solvers import SideBudget

    problem = Problem.of(
        np.ones((1, 1)), np.ones((1, 1)), 1, side=[SideBudget("latency", np.ones((1, 1)), 1.0)]
    )
    with pytest.raises(UserError, match="knows one budget only"):
        get_solver("mckp").solve(problem)


def test_no_metric():
    problem = Problem.of(np.full((1, 1), np.nan), np.ones((1, 1)), 1)
    with pytest.raises(UserError, match="needs a damage"):
        get_solver("hull").solve(problem)


def test_missing_module_is_named():
    class Absent(get_solver("hull").__class__):
        NAME, REQUIRES = "absent", ("no_such_module",)

    assert importlib.util.find_spec("no_such_module") is None
    with pytest.raises(UserError, match="pip install no_such_module"):
        Absent().solve(Problem.of(np.ones((1, 1)), np.ones((1, 1)), 1))


def test_importing_the_solvers_loads_no_torch():
    code = "import sys, bitatlas.solvers; print([m for m in ('torch', 'optuna', 'pulp', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_statuses_are_words():
    assert len(set(STATUSES)) == len(STATUSES)
    assert set(bitatlas.solvers.SOLUTION_PRESENT) | set(bitatlas.solvers.PROVED) == set(STATUSES)
