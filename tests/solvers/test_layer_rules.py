"""Published rules that look at one block or one score at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bitatlas.analysis.schema import SensitivityTable, TieGroup, UserError
from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.double_pointer import DoublePointer, pointers
from bitatlas.solvers.threshold import Threshold
from tests.conformance.solver import SolverConformance


class TestThresholdOnDamage(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Threshold()


class TestThresholdOnScore(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Threshold()

    def prepare(self, problem: Problem) -> Problem:
        rng = np.random.default_rng(len(problem.units))
        score = rng.normal(size=len(problem.units))
        return dataclasses.replace(problem, score=np.where(rng.random(len(score)) < 0.2, np.nan, score))


class TestDoublePointer(SolverConformance):
    @pytest.fixture
    def solver(self):
        return DoublePointer()


def _blocks(limit: int, n: int = 4, each: int = 3, **more) -> Problem:
    """An embedding and ``n`` blocks of ``each`` units of 800 weights; 2, 3 and 4 bits."""
    layers = np.array([-1, *np.repeat(np.arange(n), each)])
    units = ["embed", *(f"{b}.{i}" for b in range(n) for i in range(each))]
    size = np.tile([200, 300, 400], (len(layers), 1))
    more.setdefault("damage", np.full(size.shape, np.nan))
    damage = more.pop("damage")
    return Problem.of(damage, size, limit, units=units, formats=["b2", "b3", "b4"], layers=layers,
                      params=np.full(len(layers), 800), **more)  # fmt: skip


def _table(problem: Problem, metric: str, values: list[float]) -> SensitivityTable:
    one = np.array(values)[:, None]
    return SensitivityTable(metric, problem.units, ("-",), one, one * np.nan, np.ones(one.shape, np.int64))


class TestThresholdRule:
    LIM = (np.nan, *np.repeat([-0.9, -0.2, -0.5, -0.7], 3))

    def test_the_more_important_blocks_are_wide(self):
        # Room for the embedding and two of four blocks: those with the largest LIM.
        problem = _blocks(13 * 200 + 7 * 100)
        choice = get_solver("threshold").solve(problem.with_score(_table(problem, "lim", self.LIM))).choice
        assert choice.reshape(-1)[1:].reshape(4, 3).tolist() == [[0] * 3, [1] * 3, [1] * 3, [0] * 3]
        assert choice[0] == 1

    def test_of_zd_the_smaller_is_more_important(self):
        problem = _blocks(13 * 200 + 7 * 100)
        zd = [0.0, *np.repeat([0.15, 0.17, 0.16, 0.14], 3)]
        choice = get_solver("threshold").solve(problem.with_score(_table(problem, "zd", zd))).choice
        assert choice[1:].reshape(4, 3).tolist() == [[1] * 3, [0] * 3, [0] * 3, [1] * 3]

    def test_the_share_grows_with_the_bytes_and_the_block_at_the_threshold_is_split(self):
        wide = []
        for steps in range(13):
            problem = _blocks(13 * 200 + 100 * steps + 99)
            solution = get_solver("threshold").solve(problem.with_score(_table(problem, "lim", self.LIM)))
            assert solution.certificate.payload_bytes == 13 * 200 + 100 * steps
            wide.append({u for u, j in zip(problem.units, solution.choice) if j == 1})
        assert all(len(a) + 1 == len(b) and a < b for a, b in zip(wide, wide[1:]))

    def test_pins_and_ties_hold(self):
        tie = TieGroup("t", ("1.0", "0.0"))  # the most and the least important block
        problem = _blocks(13 * 200 + 7 * 100 + 200, ties=[tie], pins={"1.1": "b2", "3.2": "b4"})
        choice = get_solver("threshold").solve(problem.with_score(_table(problem, "lim", self.LIM))).choice
        named = dict(zip(problem.units, choice.tolist()))
        assert named["1.0"] == named["0.0"] == 1
        assert (named["1.1"], named["3.2"]) == (0, 2)

    def test_an_unknown_unit_ranks_as_its_block(self):
        lim = list(self.LIM)
        lim[4] = np.nan  # of block 1
        problem = _blocks(13 * 200 + 4 * 100)
        choice = get_solver("threshold").solve(problem.with_score(_table(problem, "lim", lim))).choice
        assert choice[1:].reshape(4, 3)[1].tolist() == [1, 1, 1]

    def test_a_damage_ranks_by_its_narrower_format(self):
        hurt = np.array([5.0, *range(12)])
        problem = _blocks(13 * 200 + 3 * 100, damage=hurt[:, None] * [1, 0.5, 0.1])
        choice = get_solver("threshold").solve(problem).choice
        assert np.flatnonzero(choice).tolist() == [10, 11, 12]

    def test_nothing_to_rank_by(self):
        with pytest.raises(UserError, match="needs a score or a damage"):
            get_solver("threshold").solve(_blocks(10_000))

    def test_a_score_has_no_formats(self):
        problem = _blocks(10_000)
        two = np.zeros((13, 2))
        table = SensitivityTable("x", problem.units, ("b2", "b3"), two, two, two.astype(np.int64))
        with pytest.raises(ValueError, match="2 formats"):
            problem.with_score(table)


class TestDoublePointerRule:
    def _best_k(self, damage: np.ndarray) -> int:
        """Of k lowest down and k highest up, the k of least damage, by trying all."""
        order = np.argsort(damage[:, 1], kind="stable")
        totals = []
        for k in range(len(order) // 2 + 1):
            down, up = order[:k], order[len(order) - k :]
            rest = np.setdiff1d(order, np.concatenate([down, up]))
            totals.append(damage[down, 0].sum() + damage[rest, 1].sum() + damage[up, 2].sum())
        return int(np.argmin(totals))

    @pytest.mark.parametrize("seed", range(20))
    def test_equal_numbers_and_the_best_k_of_each_block(self, seed):
        rng = np.random.default_rng(seed)
        hurt = rng.lognormal(0, 1.5, (1 + 2 * 8, 1))
        damage = hurt * [6.0, 1.0, 0.2] * rng.lognormal(0, 0.1, (17, 3))
        problem = _blocks(17 * 300, n=2, each=8, damage=damage)
        choice = get_solver("double_pointer").solve(problem).choice
        assert choice[0] == 1
        for block in (0, 1):
            rows = np.arange(1 + 8 * block, 9 + 8 * block)
            k = self._best_k(damage[rows])
            order = rows[np.argsort(damage[rows, 1], kind="stable")]
            assert np.flatnonzero(choice[rows] == 0).size == k
            assert set(rows[choice[rows] == 0]) == set(order[:k])
            assert set(rows[choice[rows] == 2]) == set(order[8 - k :])

    def test_some_blocks_move(self):
        damage = np.array([1.0, *np.tile([0.01, 0.02, 5.0, 9.0], 2)])[:, None] * [3.0, 1.0, 0.3]
        problem = _blocks(9 * 300, n=2, each=4, damage=damage)
        assert get_solver("double_pointer").solve(problem).choice.tolist() == [1, 0, 0, 2, 2, 0, 0, 2, 2]

    def test_unlike_sizes_never_cost_more_than_was_freed(self):
        rng = np.random.default_rng(3)
        for _ in range(200):
            n = int(rng.integers(1, 12))
            size = np.sort(rng.integers(1, 900, (n, 3)), axis=1)
            damage = np.sort(rng.lognormal(0, 1, (n, 3)), axis=1)[:, ::-1]
            move, _ = pointers(damage, size)
            rows = np.arange(n)
            assert size[rows, move + 1].sum() <= size[:, 1].sum()
            assert damage[rows, move + 1].sum() <= damage[:, 1].sum() + 1e-12

    def test_bytes_above_b_go_to_the_most_salient(self):
        damage = np.array([0.5, 1.0, 2.0, 4.0, 3.0])[:, None] * [
            9.0,
            1.0,
            0.9,
        ]  # nothing is worth a step down
        problem = _blocks(5 * 300 + 250, n=1, each=4, damage=damage)
        assert get_solver("double_pointer").solve(problem).choice.tolist() == [1, 1, 1, 2, 2]

    def test_a_tie_over_blocks_stays(self):
        damage = np.array([1.0, *np.tile([0.01, 0.02, 5.0, 9.0], 2)])[:, None] * [3.0, 1.0, 0.3]
        problem = _blocks(9 * 300, n=2, each=4, damage=damage, ties=[TieGroup("t", ("0.0", "1.3"))])
        named = dict(zip(problem.units, get_solver("double_pointer").solve(problem).choice.tolist()))
        assert named["0.0"] == named["1.3"] == 1
