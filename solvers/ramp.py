"""RAMP-style: a policy walks over the units, sees eleven size-free features of each, and says its bits.

Only RAMP's abstract is public; features, reward constants and network are ours, which is why this is called RAMP-style.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.sac import Episodes, Sac
from bitatlas.solvers.searcher import Reading, Searcher, State, solve_costs

__all__ = ["Ramp"]

_STATIC = 9
_MEMORY = 4_000_000
"""Choices kept for learning, of the newest episodes; a byte each."""
_LEAST_KL = 1e-6
"""Nats; below it, KL is rounding."""


class Ramp(Searcher):
    """Soft actor-critic over whole allocations; each is brought to the budget by the exact knapsack before it is measured.

    Features per unit: nine of `analysis.unit_features`, the effective bits given to the unit before, and the budget left
    per weight left. The reward falls with the log of the measured KL; beyond the budget it falls ten times as fast as for unused
    budget. ``cliff`` adds a step at the edge: the policy feels it through the spread of what it asks for, and keeps away. It is off by
    default, since the knapsack keeps to the bytes anyway and policies trained with it were worse (`docs/decisions.md`).

    ``steps`` rounds of ``episodes`` rollouts on the same ``tokens``, the first of them without noise, then ``updates`` of the
    networks on ``batch`` units in whole episodes; what looks best meets the best so far on ``judge_tokens``. What is learned from is
    what was measured: the allocation after the knapsack. The networks see the features with noise of ``blur`` standard
    deviations, so that a policy leans on no oddity of one model. It knows no unit by name and can be applied unchanged to
    another model: ``policy`` with ``steps=0``.
    """

    NAME: ClassVar[str] = "ramp"
    TITLE: ClassVar[str] = "RAMP-style (SAC)"
    SOURCE: ClassVar[str] = "after the abstract of arXiv 2603.17891; soft actor-critic, Haarnoja et al. 2018"
    STEP: ClassVar[str] = "round"
    NEEDS_FEATURES: ClassVar[bool] = True
    HAS_POLICY: ClassVar[bool] = True
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 20, "episodes": 16, "tokens": 512, "judge_tokens": 2048, "updates": 32, "batch": 2048, "hidden": 32, "lr": 3e-3,
        "blur": 0.5, "over": 10.0, "under": 1.0, "cliff": 0.0,
    }  # fmt: skip

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        if step == 0:
            return (Reading(settings["judge_tokens"], 1 + starts),)
        return Reading(settings["tokens"], max(1, settings["episodes"])), Reading(settings["judge_tokens"], 2)

    def proposal(self) -> np.ndarray:
        """(U,) the allocation of the given (or untrained) policy without noise; nothing is measured.

        Raises:
            UserError: no features, or a policy file that does not fit.
        """
        if self.features is None or self.features.shape != (len(self.problem.units), _STATIC):
            raise UserError(
                "RAMP-style search needs the units' features",
                found="none" if self.features is None else str(self.features.shape),
            )
        wanted = self._walk(self._learner(None), None, None)
        return self.problem.classes.expand(self._project(wanted[0]))

    def begin(self) -> State:
        """The allocation of the untrained (or given) policy, and the given starts."""
        starts = np.array([self.proposal(), *self.start])
        scores = self.objective.scores(starts, int(self.settings["judge_tokens"]), self.seed)
        best = int(np.argmin(scores.mean))
        return {
            "choice": starts[best], "kl": scores.mean[best], "done": np.array(False), "reward": np.array(np.nan),
            "given": np.zeros((0, len(self._low)), np.uint8), "log_kl": np.zeros(0), **_policy(self._learner(None)),
        }  # fmt: skip

    def step(self, state: State, number: int) -> State:
        """One round of rollouts and learning."""
        rng, learner = self.rng(number), self._learner(state)
        episodes, expand = max(1, int(self.settings["episodes"])), self.problem.classes.expand
        noise, turn = (rng.normal(size=(episodes, n)) for n in (len(self._low), learner.hidden))
        wanted = np.concatenate([self._walk(learner, None, None), self._walk(learner, noise, turn)[1:]])
        given = np.array([self._project(w) for w in wanted]).astype(np.uint8)
        text = rng.integers(2**31, size=2).tolist()
        choices = np.array([expand(g) for g in given])
        scores = self.objective.scores(choices, int(self.settings["tokens"]), text[0]).mean
        kept = max(episodes, _MEMORY // len(self._low))
        memory = {
            "given": np.concatenate([state["given"], given])[-kept:],
            "log_kl": np.concatenate([state["log_kl"], np.log(np.maximum(scores, _LEAST_KL))])[-kept:],
        }
        blur = float(self.settings["blur"])
        count = max(2, int(self.settings["batch"]) // len(self._low))
        for _ in range(int(self.settings["updates"])):
            at = rng.integers(len(memory["log_kl"]), size=count)
            shift = blur * rng.normal(size=(count, *self._static.shape))
            batch = self._episodes(memory["given"][at], memory["log_kl"][at], shift)
            learner.criticise(batch)
            learner.improve(batch, rng)
        two = np.stack([state["choice"], choices[int(np.argmin(scores))]])
        judged = self.objective.scores(two, int(self.settings["judge_tokens"]), text[1]).mean
        best = int(np.argmin(judged))
        return {
            "choice": two[best], "kl": judged[best], "done": np.array(False),
            "reward": np.array(self.reward(float(scores[0]), self._share(wanted[0]))), **memory, **_policy(learner),
        }  # fmt: skip

    def reward(self, kl: float, share: float) -> float:
        """Of an episode: measured KL in nats, and the wanted bytes as a share of the budget."""
        quality = -float(np.log(max(kl, _LEAST_KL)))
        if share > 1:
            return quality - float(self.settings["over"]) * (share - 1) - float(self.settings["cliff"])
        return quality - float(self.settings["under"]) * (1 - share)

    @cached_property
    def _static(self) -> np.ndarray:
        """(C, 9) the first unit of every class stands for it."""
        assert self.features is not None
        return self.features[np.unique(self.problem.classes.of_unit, return_index=True)[1]]

    @cached_property
    def _params(self) -> np.ndarray:
        """(C,) weights."""
        c = self.problem.classes
        return np.bincount(c.of_unit, weights=self.problem.params, minlength=len(c.bytes))

    @cached_property
    def _bits(self) -> np.ndarray:
        """(C, F) effective bits, NaN where not allowed."""
        c = self.problem.classes
        return np.where(c.allowed, c.bytes * 8 / self._params[:, None], np.nan)

    @cached_property
    def _low(self) -> np.ndarray:
        return np.nanmin(self._bits, axis=1)

    @cached_property
    def _high(self) -> np.ndarray:
        return np.nanmax(self._bits, axis=1)

    @property
    def _budget(self) -> float:
        """Effective bits per weight."""
        return self.problem.limit_bytes * 8 / float(self._params.sum())

    def _share(self, bits: np.ndarray) -> float:
        """Bytes of bits (C,) over the budget."""
        return float(bits @ self._params) / 8 / self.problem.limit_bytes

    def _walk(self, learner: Sac, noise: np.ndarray | None, turn: np.ndarray | None) -> np.ndarray:
        """(E, C) wanted bits of episodes side by side; noise (E, C) and turn (E, hidden) of `Sac.act`, None = one walk without."""
        low, high = self._low, self._high
        wanted = np.zeros((1 if noise is None else len(noise), len(low)))
        before, left = np.zeros(len(wanted)), np.full(len(wanted), float(self.problem.limit_bytes))
        weights = float(self._params.sum())
        for i in range(len(low)):
            static = np.broadcast_to(self._static[i], (len(before), _STATIC))
            state = np.concatenate([static, _changing(before, left, np.array(weights))], axis=-1)
            action = learner.act(state, None if noise is None else noise[:, i], turn)
            wanted[:, i] = low[i] + (action + 1) / 2 * (high[i] - low[i])
            pick = np.nanargmin(np.abs(self._bits[i] - wanted[:, i : i + 1]), axis=1)
            before = self._bits[i, pick]
            left = left - self.problem.classes.bytes[i, pick]
            weights -= self._params[i]
        return wanted

    def _episodes(self, given: np.ndarray, log_kl: np.ndarray, shift: np.ndarray | float = 0.0) -> Episodes:
        """Episodes as they would have been walked had the policy wanted what was measured.

        Args:
            given: (E, C) formats. log_kl: (E,). shift: (E, C, 9) added to the features.
        """
        rows = np.arange(given.shape[1])
        bits, size = self._bits[rows, given], self.problem.classes.bytes[rows, given]
        left = self.problem.limit_bytes - np.cumsum(size, axis=1) + size
        weights = self._params.sum() - np.cumsum(self._params) + self._params
        before = np.pad(bits, ((0, 0), (1, 0)))[:, :-1]
        static = np.broadcast_to(self._static + shift, (*bits.shape, _STATIC))
        state = np.concatenate([static, _changing(before, left, weights)], axis=-1)
        weight = self._params / self._params.sum()
        return Episodes(state, bits, log_kl, self._low, self._high, weight, self._budget)

    def _project(self, wanted: np.ndarray) -> np.ndarray:
        """(C,) the formats nearest to wanted bits (C,) within the bytes, in squared bits weighted by the weights."""
        far = self._params[:, None] * (self._bits - wanted[:, None]) ** 2
        return solve_costs(self.problem, np.where(self.problem.classes.allowed, far, np.inf))

    def _learner(self, state: State | None) -> Sac:
        """The networks as they were, from the state, the given policy, or fresh."""
        s = self.settings
        out = Sac(
            _STATIC + 2, max(1, int(s["hidden"])), np.random.default_rng([self.seed, 10**6]), float(s["lr"]),
            price=(-float(s["under"]), float(s["over"])), cliff=float(s["cliff"]),
        )  # fmt: skip
        arrays = self.policy if state is None else state
        known = {k.removeprefix("policy."): v for k, v in arrays.items() if k.startswith("policy.")}
        if known:
            try:
                out.restore(known)
            except (KeyError, ValueError) as e:
                raise UserError(
                    "the policy file does not fit", found=str(e), fix=f"one trained by this version, with the same --set hidden ({s['hidden']} now)",
                ) from None  # fmt: skip
        elif state is None and self.policy:
            raise UserError("the policy file holds no policy", found=", ".join(list(self.policy)[:3]))
        return out


def _changing(before: np.ndarray, left: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(..., 2) what the walk so far adds to a state: bits of the unit before, bytes left per weight left."""
    return np.stack([before / 8, np.clip(left / np.maximum(weights, 1.0), -2.0, 4.0)], axis=-1)


def _policy(learner: Sac) -> dict[str, np.ndarray]:
    return {f"policy.{k}": v for k, v in learner.arrays().items()}
