"""Verified refinement: slopes at the operating point propose, the real model judges, and noise ends it.

Around an allocation the KL has a gradient, so one backward pass orders all single changes of format from there:
    KL(x') - KL(x) ~ <grad, Q(x') - Q(x)> + step/2 * curvature * |Q(x') - Q(x)|^2
Each round solves that exactly within the bytes for several lengths of step. Other text than the slopes' judges: what is
better than the best so far by more than the noise of the paired difference is kept. When slopes propose nothing more,
level switches drawn by them go on (EvoPress, seeded), until a whole generation gains less than the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import Scores
from bitatlas.solvers.level_switch import LevelSwitch
from bitatlas.solvers.searcher import Reading, Searcher, State, solve_costs

__all__ = ["Refine"]

_LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SLOPES, _EVOLUTION = 0, 1


class Refine(Searcher):
    """A front of starts, rounds of re-read slopes, then evolution guided by them.

    Settings: at most ``steps`` rounds and generations; ``tokens`` for slopes, ``few_tokens`` for all candidates of a round,
    ``judge_tokens`` for the last two against the best so far; ``z`` standard errors of the paired difference make a gain;
    ``offspring`` of a generation; ``patience`` generations without a gain end it.
    """

    NAME: ClassVar[str] = "refine"
    TITLE: ClassVar[str] = "Verified refinement"
    SOURCE: ClassVar[str] = "ours; RCO's first-order reading of a vertex, exact knapsack steps, paired judgement, seeded EvoPress"  # fmt: skip
    STEP: ClassVar[str] = "round"
    NEEDS_DAMAGE: ClassVar[bool] = True
    NEEDS_SLOPES: ClassVar[bool] = True
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 10, "tokens": 4096, "few_tokens": 1024, "judge_tokens": 8192, "z": 1.0, "offspring": 12, "patience": 1,
        "groups": "none",
    }  # fmt: skip

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        few, judge = settings["few_tokens"], settings["judge_tokens"]
        if step == 0:
            return Reading(few, starts + 6), Reading(judge, 3)
        rivals = max(len(_LENGTHS), settings["offspring"])
        return Reading(settings["tokens"], backward=True), Reading(few, rivals), Reading(judge, 2)

    def begin(self) -> State:
        """The best of the given starts and of solutions with shrunk and rescaled damages; see `_starts`."""
        starts = self._starts()
        few = self.objective.scores(starts, self._few(), int(self.rng(0).integers(2**30)), "judge")
        # What was given is never lost to a short text.
        keep = np.union1d(np.argsort(few.mean, kind="stable")[:2], np.arange(min(len(self.start), 1)))
        scores = self._judged(starts[keep])
        best = int(np.argmin(scores.mean))
        before = scores.mean[0] if len(self.start) else np.nan
        return {
            "choice": starts[keep][best], "judged": scores.kl[best], "kl": scores.mean[best], "stderr": scores.stderr[best],
            "before": np.array(before), "done": np.array(False), "length": np.array(1.0), "phase": np.array(_SLOPES),
            "failed": np.array(0), "change": np.zeros(self.problem.damage.shape),
        }  # fmt: skip

    def step(self, state: State, number: int) -> State:
        """One round of slopes, or one generation of guided switches."""
        by_slopes, out = int(state["phase"]) == _SLOPES, dict(state)
        choice, rng = np.asarray(state["choice"]), self.rng(number)
        seeds = rng.integers(2**30, size=2).tolist()
        if by_slopes:
            out["change"], _ = self.objective.slopes(choice, int(self.settings["tokens"]), seeds[0], "learn")
            bend = self._curvature() * self.objective.distances(choice)
            lengths = float(state["length"]) * np.array(_LENGTHS)
            proposals = [self._solve(out["change"] + t * bend) for t in lengths]
        else:
            proposals = self._switched(choice, out["change"], rng)
            lengths = np.full(len(proposals), float(state["length"]))
        rivals = {p.tobytes(): (p, t) for p, t in zip(proposals, lengths) if (p != choice).any()}
        found = self._challenge(state, list(rivals.values()), seeds[1]) if rivals else None
        out |= found or {}
        patience = max(1, int(self.settings["patience"]))
        out["failed"] = np.array(0 if found else int(state["failed"]) + 1)
        if by_slopes and not found:
            out |= {"phase": np.array(_EVOLUTION), "failed": np.array(0)}
        elif found:
            out["phase"] = np.array(_SLOPES)  # from a new point the slopes may say something new
        out["done"] = np.array(int(out["phase"]) == _EVOLUTION and int(out["failed"]) >= patience)
        return out

    def _challenge(
        self, state: State, rivals: Sequence[tuple[np.ndarray, float]], seed: int
    ) -> dict[str, np.ndarray] | None:
        """The best rival, when its paired gain over the best so far is beyond the noise; else None."""
        choices = np.array([p for p, _ in rivals])
        few = self.objective.scores(choices, self._few(), seed, "judge")
        best = np.argsort(few.mean, kind="stable")[:2]
        fresh = self._judged(choices[best])
        scores = Scores(np.concatenate([state["judged"][None], fresh.kl]), fresh.tokens)
        at = 1 + int(np.argmin(fresh.mean))
        gain, error = scores.difference(0, at)
        if not gain > float(self.settings["z"]) * float(np.nan_to_num(error)):
            return None
        won = int(best[at - 1])
        return {"choice": choices[won], "judged": scores.kl[at], "kl": scores.mean[at], "stderr": scores.stderr[at],
                "length": np.array(rivals[won][1])}  # fmt: skip

    def _few(self) -> int:
        return int(self.settings["few_tokens"])

    def _judged(self, choices: np.ndarray) -> Scores:
        """Scores on the judging text, the same in every round, so that differences between rounds are paired too."""
        return self.objective.scores(choices, int(self.settings["judge_tokens"]), self.seed, "judge")

    def _starts(self) -> np.ndarray:
        """The given starts; then exact solutions of damages bent in the ways that predictions are known to be wrong.

        Optimised allocations pick what was underestimated, coarse formats above all: powers below one shrink the table
        towards each format's mean (in logarithms), factors make the two coarsest formats dearer.
        """
        c, found = self.problem.classes, [np.asarray(s) for s in self.start]
        log = np.log(np.maximum(np.where(c.allowed, c.damage, 1.0), 1e-12))
        mean = np.where(c.allowed, log, 0.0).sum(axis=0) / np.maximum(c.allowed.sum(axis=0), 1)  # (F,)
        coarse = np.argsort(np.argsort(self.problem.bytes.sum(axis=0), kind="stable"), kind="stable")
        for power in (1.0, 0.75):
            for factor in (1.0, 2.0, 4.0):
                dearer = np.select([coarse == 0, coarse == 1], [factor, factor**0.5], 1.0)
                cost = np.exp(mean + power * (log - mean)) * dearer
                found.append(c.expand(solve_costs(self.problem, np.where(c.allowed, cost, np.inf))))
        return np.array(list({f.tobytes(): f for f in (np.asarray(f, np.int64) for f in found)}.values()))

    def _curvature(self) -> np.ndarray:
        """(U, 1) damage per squared error: half the mean curvature along a unit's quantisation errors."""
        d, far = self.problem.damage, self._errors
        ratio = np.where((far > 0) & np.isfinite(d), np.maximum(d, 0.0) / np.where(far > 0, far, 1.0), np.nan)
        with np.errstate(all="ignore"):
            middle = np.exp(np.nanmedian(np.log(np.maximum(ratio, 1e-300)), axis=1))
        return np.nan_to_num(middle)[:, None]

    @cached_property
    def _errors(self) -> np.ndarray:
        """(U, F) squared error of every format against the finest one."""
        finest = np.where(self.problem.allowed, self.problem.bytes, -1).argmax(axis=1)
        return self.objective.distances(finest)

    def _merged(self, table: np.ndarray) -> np.ndarray:
        c = self.problem.classes
        out = np.zeros(c.bytes.shape)
        np.add.at(out, c.of_unit, table)
        return np.where(c.allowed, out, np.inf)

    def _solve(self, change: np.ndarray) -> np.ndarray:
        return self.problem.classes.expand(solve_costs(self.problem, self._merged(change)))

    def _switched(self, choice: np.ndarray, change: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Offspring by level switches; of eight draws each the one that the last slopes like best."""
        c = self.problem.classes
        switch = LevelSwitch(self.problem, str(self.settings["groups"]))
        level = switch.level(c.expand_back(choice))
        cost, rows = self._merged(change), np.arange(len(c.bytes))
        out = []
        for _ in range(max(1, int(self.settings["offspring"]))):
            drawn = [switch.formats(switch.mutate(level, rng)) for _ in range(8)]
            out.append(c.expand(min(drawn, key=lambda f: float(cost[rows, f].sum()))))
        return out
