"""RCO: the relaxed choice moves along the manifold of exactly the budget, driven by gradients of the real loss.

p_i = softmax(a_i),  C(a) = sum_i sum_k p_ik bytes_ik = B
normal    n_ik = p_ik (bytes_ik - E_p[bytes_i])
tangent   g <- g - (<g, n> / <n, n>) n
retract   a <- a + t * bytes, t by bisection, as C falls and rises with t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.byte_groups import byte_groups
from bitatlas.solvers.front_cache import fill
from bitatlas.solvers.searcher import Reading, Searcher, State, solve_costs

__all__ = ["Manifold", "Rco"]


class Manifold:
    """The relaxed budget over classes (C, F); sizes counted in shares of the dearest option's bytes.

    Attributes:
        cost: (C, F) extra bytes over the class's smallest option, as a share of the largest of all extras.
        budget: what the sum of the expected costs has to be.
    """

    def __init__(self, size: np.ndarray, allowed: np.ndarray, limit: int) -> None:
        least = np.where(allowed, size, np.iinfo(np.int64).max).min(axis=1)
        extra = np.where(allowed, size - least[:, None], 0)
        scale = max(int(extra.max()), 1)
        self.allowed, self.cost = allowed, extra / scale
        # A budget beyond the largest allocation binds nothing.
        most = float(np.where(allowed, self.cost, 0.0).max(axis=1).sum())
        self.budget = min((limit - int(least.sum())) / scale, most * (1 - 1e-6))

    def softmax(self, a: np.ndarray) -> np.ndarray:
        """(C, F) probabilities; 0 where not allowed."""
        z = np.where(self.allowed, a, -np.inf)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def expected(self, a: np.ndarray) -> float:
        """C(a)."""
        return float((self.softmax(a) * self.cost).sum())

    def tangent(self, a: np.ndarray, g: np.ndarray) -> np.ndarray:
        """``g`` without its part along the normal."""
        p = self.softmax(a)
        n = p * (self.cost - (p * self.cost).sum(axis=1, keepdims=True))
        return g - (g * n).sum() / ((n * n).sum() + 1e-12) * n

    def retract(self, a: np.ndarray) -> np.ndarray:
        """The point a + t * cost that meets the budget."""
        low, high = -1.0, 1.0
        for _ in range(40):
            if self.expected(a + low * self.cost) <= self.budget:
                break
            low *= 2
        for _ in range(40):
            if self.expected(a + high * self.cost) >= self.budget:
                break
            high *= 2
        for _ in range(80):
            t = (low + high) / 2
            if self.expected(a + t * self.cost) > self.budget:
                high = t
            else:
                low = t
        return a + low * self.cost


class Rco(Searcher):
    """Gumbel noise, the exact best choice for the noisy logits within the bytes, its gradient straight through, Adam.

    Bytes are integers in the knapsack, so no expert is too small to count. The gradient towards an option is
    ``<grad_W KL, W_option - W_chosen>`` at the chosen vertex, one backward pass for all of them. With ``surrogate`` it is
    the table's damage instead, and the real model judges only. ``steps`` steps of ``samples`` draws on
    ``tokens`` each; the temperature falls exponentially from 1 to ``tau_min``. The rounded solution and the best vertices
    meet at the end of every ``judge_every`` steps on ``judge_tokens``. The likeliest formats need not take all bytes: what
    the knapsack leaves is spent by single steps before anything is judged, as the published rounding asks for the exact budget.
    Limits on groups bind the vertices, not the manifold.
    """

    NAME: ClassVar[str] = "rco"
    TITLE: ClassVar[str] = "RCO"
    SOURCE: ClassVar[str] = "Helcig & Alistarh 2026, arXiv 2605.00649; tangent projection and retraction"
    STEP: ClassVar[str] = "step"
    NEEDS_SLOPES: ClassVar[bool] = True
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 200, "samples": 4, "tokens": 2048, "lr": 0.1, "tau_min": 0.01, "gradient": "model", "init": "damage",
        "judge_every": 25, "judge_tokens": 8192,
    }  # fmt: skip

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        if step == 0:
            return (Reading(settings["judge_tokens"], 1 + starts),)
        by_model = settings["gradient"] == "model"
        out = [Reading(settings["tokens"], backward=True)] * (max(1, settings["samples"]) if by_model else 0)
        judges = step % max(1, settings["judge_every"]) == 0 or step == settings["steps"]
        return (*out, Reading(settings["judge_tokens"], 3)) if judges else tuple(out)

    def begin(self) -> State:
        """Logits from the damages (or flat), on the manifold; the first vertex measured."""
        p, c = self.problem, self.problem.classes
        if self.settings["gradient"] not in ("model", "surrogate") or (
            self.settings["gradient"] == "surrogate" and not p.has_damage
        ):
            raise UserError(
                "RCO's gradient is `model`, or `surrogate` where a metric was named",
                found=self.settings["gradient"],
            )
        a = np.zeros(c.bytes.shape)
        if p.has_damage and self.settings["init"] == "damage":
            a = -np.log(np.where(c.allowed, np.maximum(c.damage, 0.0), 1.0) + 1e-8)
            a -= a.mean(axis=1, keepdims=True)
        a = self._manifold().retract(a)
        starts = [c.expand(self._spend(solve_costs(p, -np.where(c.allowed, a, -np.inf)), a)), *self.start]
        scores = self.objective.scores(np.array(starts), int(self.settings["judge_tokens"]), self.seed)
        best = int(np.argmin(scores.mean))
        zero = np.zeros_like(a)
        return {"choice": starts[best], "kl": scores.mean[best], "done": np.array(False), "logits": a, "first": zero,
                "second": zero, "vertex": starts[best], "vertex_kl": np.array(np.inf)}  # fmt: skip

    def step(self, state: State, number: int) -> State:
        """One step of Adam along the manifold."""
        p, c, m, rng = self.problem, self.problem.classes, self._manifold(), self.rng(number)
        tau = float(self.settings["tau_min"]) ** ((number - 1) / max(self.steps - 1, 1))
        a = state["logits"]
        total, vertex, vertex_kl = np.zeros_like(a), state["vertex"], float(state["vertex_kl"])
        samples = max(1, int(self.settings["samples"]))
        for _ in range(samples):
            z = (a + rng.gumbel(size=a.shape)) / tau
            soft = m.softmax(z)
            hard = c.expand(solve_costs(p, -np.where(c.allowed, z, -np.inf)))
            slope, kl = self._slope(hard, int(rng.integers(2**31)))
            total += soft * (slope - (soft * slope).sum(axis=1, keepdims=True)) / tau / samples
            if kl < vertex_kl:
                vertex, vertex_kl = hard, kl
        g = m.tangent(a, total)
        first = 0.9 * state["first"] + 0.1 * g
        second = 0.999 * state["second"] + 0.001 * g**2
        move = (first / (1 - 0.9**number)) / (np.sqrt(second / (1 - 0.999**number)) + 1e-8)
        a = m.retract(a - float(self.settings["lr"]) * m.tangent(a, move))
        out = {**state, "logits": a, "first": m.tangent(a, first), "second": second, "vertex": vertex,
               "vertex_kl": np.array(vertex_kl)}  # fmt: skip
        if number % max(1, int(self.settings["judge_every"])) == 0 or number == self.steps:
            out |= self._judge(out, number)
        return out

    def _judge(self, state: State, number: int) -> State:
        """The rounded logits, the best vertex seen and the best so far on the same text."""
        p, c = self.problem, self.problem.classes
        log_p = np.log(np.maximum(self._manifold().softmax(state["logits"]), 1e-300))
        rounded = solve_costs(p, -np.where(c.allowed, log_p, -np.inf))
        proposed = [
            self._spend(choice, state["logits"]) for choice in (rounded, c.expand_back(state["vertex"]))
        ]
        three = np.stack([state["choice"], *map(c.expand, proposed)])
        scores = self.objective.scores(three, int(self.settings["judge_tokens"]), self.seed + number)
        best = int(np.argmin(scores.mean))
        return {"choice": three[best], "kl": scores.mean[best], "vertex_kl": np.array(np.inf)}

    def _spend(self, choice: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """(C,) the choice with the bytes that it leaves: by damage where it is known, else by bytes times probability."""
        c = self.problem.classes
        if not self.problem.has_damage:
            extra = c.bytes - c.bytes[np.arange(len(choice)), choice][:, None]
            worth = extra * np.where(extra > 0, self._manifold().softmax(logits), 1.0)
            c = replace(c, damage=np.where(c.allowed, -worth, np.inf))
        groups = byte_groups(self.problem)
        rooms = None if groups is None else groups.rooms(c, choice)
        return fill(c, choice, self.problem.limit_bytes, rooms)

    def _slope(self, choice: np.ndarray, text: int) -> tuple[np.ndarray, float]:
        """(C, F) change of the loss towards every option of the classes, and the loss."""
        c = self.problem.classes
        if self.settings["gradient"] == "surrogate":
            return np.where(c.allowed, c.damage, 0.0), float(
                self.problem.objective(c.expand(c.expand_back(choice)))
            )
        slope, kl = self.objective.slopes(choice, int(self.settings["tokens"]), text)
        merged = np.zeros(c.bytes.shape)
        np.add.at(merged, c.of_unit, slope)
        return merged, kl

    def _manifold(self) -> Manifold:
        c = self.problem.classes
        return Manifold(c.bytes, c.allowed, self.problem.limit_bytes)
