"""Path descent: follow the best allocation down from a larger budget, re-reading the slopes on the way.

Damages measured at the original weights are right there and wrong at two or three bits, where the damages of many units
add up to more than their sum. So the search starts where they are right, at a larger budget, and walks to the asked one in
a few steps. Each reads the gradient of the real KL at the allocation in hand, and solves exactly, within the next budget,
    min_x' <grad, Q(x') - Q(x)> + length * curvature * |Q(x') - Q(x)|^2,
for several lengths; the real model picks among them. At the asked budget proposals are drawn: slopes are known with an
error (from parts of the text), and each proposal solves for another draw of them (Thompson sampling), so that search goes
where the slopes are uncertain. Fresh text judges every round, in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.solvers.refine import Refine
from bitatlas.solvers.searcher import Reading, State, solve_costs

__all__ = ["PathDescent"]

_LENGTHS = (0.5, 1.0, 2.0)


class PathDescent(Refine):
    """The walk, then rounds of drawn proposals.

    Settings: the walk starts ``above`` (a share) the budget and takes ``stages`` steps of equal ratio; at most ``steps``
    steps in all; ``tokens`` for slopes, in ``parts``; ``few_tokens`` for all proposals of a step, ``judge_tokens`` of fresh
    text for the best two against the best so far; ``offspring`` proposals a round, drawn ``spread`` standard errors wide;
    ``prior``: weight of the measured damages beside the slopes; ``patience`` rounds without a gain end it.
    """

    NAME: ClassVar[str] = "path"
    TITLE: ClassVar[str] = "Path descent"
    SOURCE: ClassVar[str] = (
        "ours; exact knapsack steps along the budget with re-read slopes, Thompson draws, paired judgement"
    )
    STEP: ClassVar[str] = "step"
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 12, "above": 0.17, "stages": 4, "tokens": 2048, "parts": 4, "few_tokens": 1024, "judge_tokens": 3072,
        "offspring": 8, "spread": 1.0, "prior": 0.5, "patience": 2, "groups": "none", "z": 0.7,
    }  # fmt: skip

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        few, judge = settings["few_tokens"], settings["judge_tokens"]
        if step == 0:
            return Reading(few, starts + 1), Reading(judge, min(starts + 1, 3))
        stages, parts = max(1, settings["stages"]), max(2, settings["parts"])
        if step <= stages:
            walked = (Reading(settings["tokens"], backward=True), Reading(few, len(_LENGTHS)))
            return (*walked, Reading(judge, 2)) if step == stages else walked
        slopes = [Reading(max(1, settings["tokens"] // parts), backward=True)] * parts
        return *slopes, Reading(few, max(1, settings["offspring"])), Reading(judge, 3)

    def begin(self) -> State:
        """The best of the feasible starts, and the exact solution of the table at the larger budget."""
        state = super().begin()
        wide = self.problem.with_limit(self._limit(0))
        c = self.problem.classes
        top = c.expand(solve_costs(wide, np.where(c.allowed, c.damage, np.inf)))
        shape = (0, *self.problem.damage.shape)
        return state | {"walk": top, "length": np.array(2.0), "tables": np.zeros(shape)}

    def _starts(self) -> np.ndarray:
        """The given starts and the exact solution of the table; the walk brings the rival."""
        c = self.problem.classes
        exact = c.expand(solve_costs(self.problem, np.where(c.allowed, c.damage, np.inf)))
        return np.array([*self.start, exact])

    def step(self, state: State, number: int) -> State:
        """One step of the walk, or one round at the asked budget."""
        return self._walk(state, number) if number <= self._stages else self._round(state, number)

    @property
    def _stages(self) -> int:
        return max(1, int(self.settings["stages"]))

    def _limit(self, stage: int) -> int:
        """Bytes of a stage; the last is the asked budget."""
        left = 1 - stage / self._stages
        return int(self.problem.limit_bytes * (1 + float(self.settings["above"])) ** left)

    def _walk(self, state: State, number: int) -> State:
        """To the next smaller budget; the end of the walk challenges the best start."""
        here, rng = np.asarray(state["walk"]), self.rng(number)
        seeds = rng.integers(2**30, size=3).tolist()
        change, _ = self.objective.slopes(here, int(self.settings["tokens"]), seeds[0], "learn")
        bend = self._curvature() * self.objective.distances(here)
        narrow = self.problem.with_limit(self._limit(number))
        lengths = float(state["length"]) * np.array(_LENGTHS)
        c = self.problem.classes
        found = np.array(
            [
                c.expand(solve_costs(narrow, self._merged(self._with_prior(change + t * bend, here))))
                for t in lengths.tolist()
            ]
        )
        few = self.objective.scores(found, self._few(), seeds[1], "judge")
        best = int(np.argmin(few.mean))
        out = {**state, "walk": found[best], "length": np.array(np.clip(lengths[best], 0.25, 16.0))}
        if number == self._stages:
            out |= self._against_best(out, found[best][None], seeds[2]) or {}
        return out

    def _round(self, state: State, number: int) -> State:
        """Slopes in parts, proposals drawn within their error, the best two judged on fresh text."""
        choice, rng, out = np.asarray(state["choice"]), self.rng(number), dict(state)
        seeds = rng.integers(2**30, size=2 + max(2, int(self.settings["parts"]))).tolist()
        each = max(1, int(self.settings["tokens"]) // (len(seeds) - 2))
        rows = np.arange(len(choice))
        new = np.array([self.objective.slopes(choice, each, seed, "learn")[0] for seed in seeds[2:]])
        # A gradient changes slowly along the search: the round before still says something, from the new choice.
        old = state["tables"] - state["tables"][:, rows, choice][:, :, None]
        tables = np.concatenate([old, new])[-2 * len(new) :]
        mean, error = tables.mean(axis=0), tables.std(axis=0, ddof=1) / np.sqrt(len(tables))
        bend = self._curvature() * self.objective.distances(choice)
        proposals: dict[bytes, tuple[np.ndarray, float]] = {}
        for draw in range(max(1, int(self.settings["offspring"]))):
            length = float(state["length"]) * float(2.0 ** rng.uniform(-1.5, 1.5))
            noise = rng.standard_normal((len(choice), 1)) * (float(self.settings["spread"]) if draw else 0.0)
            found = self._solve(self._with_prior(mean + noise * error + length * bend, choice))
            if (found != choice).any():
                proposals[found.tobytes()] = (found, length)
        won = None
        if proposals:
            choices = np.array([p for p, _ in proposals.values()])
            few = self.objective.scores(choices, self._few(), seeds[0], "judge")
            best = np.argsort(few.mean, kind="stable")[:2]
            won = self._against_best(out, choices[best], seeds[1])
        failed = 0 if won else int(state["failed"]) + 1
        # Too short a step proposes nothing, too long a one is rejected.
        factor = 1.0 if won else (1.5 if proposals else 0.5)
        out |= won or {}
        out |= {
            "tables": tables, "length": np.array(np.clip(float(state["length"]) * factor, 0.05, 64.0)), "failed": np.array(failed),
            "done": np.array(failed >= max(1, int(self.settings["patience"]))),
        }  # fmt: skip
        return out

    def _with_prior(self, change: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """(U, F) expected changes of the KL: slopes, and what the measured damages say of the same change.

        Slopes know the allocation and are read from little text, damages are read from more and know the original only; their
        errors have nothing to do with each other.
        """
        table, share = self.problem.damage, min(float(self.settings["prior"]), 1.0)
        known = np.isfinite(table)
        said = np.where(known, table, 0.0) - table[np.arange(len(choice)), choice][:, None]
        return np.where(known, (1 - share) * change + share * said, change)

    def _against_best(self, state: State, rivals: np.ndarray, seed: int) -> dict[str, np.ndarray] | None:
        """The best rival, when it is better than the best so far on fresh text; else None."""
        judged = self.objective.scores(
            np.concatenate([np.asarray(state["choice"])[None], rivals]), int(self.settings["judge_tokens"]), seed, "judge"
        )  # fmt: skip
        at = 1 + int(np.argmin(judged.mean[1:]))
        gain, error = judged.difference(0, at)
        if not gain > float(self.settings["z"]) * float(np.nan_to_num(error)):
            return None
        return {"choice": rivals[at - 1], "kl": judged.mean[at], "stderr": judged.stderr[at]}
