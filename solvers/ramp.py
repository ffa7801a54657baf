"""RAMP-style: a policy walks over the units, sees eleven size-free features of each, and says its bits.

Only RAMP's abstract is public; features, reward constants and network are ours, which is why this is called RAMP-style.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.sac import Sac
from bitatlas.solvers.searcher import Searcher, State, solve_costs

__all__ = ["Ramp"]

_STATIC = 9
_MEMORY = 20_000
"""Transitions kept for learning, the newest."""


class Ramp(Searcher):
    """Soft actor-critic over whole allocations; each is brought to the budget by the exact knapsack before it is measured.

    Features per unit: nine of `analysis.unit_features`, the effective bits given to the unit before, and the budget left
    per weight left. The reward falls with the measured KL; beyond the budget it falls ten times as fast as for unused
    budget, with a cliff of 1 at the edge. ``steps`` rounds of ``episodes`` rollouts on the same ``tokens``, the first of
    them without noise, then ``updates`` of the networks; what looks best meets the best so far on ``judge_tokens``. The policy
    knows no unit by name, so it can be applied unchanged to another model: ``policy`` with ``steps=0``.
    """

    NAME: ClassVar[str] = "ramp"
    TITLE: ClassVar[str] = "RAMP-style (SAC)"
    SOURCE: ClassVar[str] = "after the abstract of arXiv 2603.17891; soft actor-critic, Haarnoja et al. 2018"
    STEP: ClassVar[str] = "round"
    NEEDS_FEATURES: ClassVar[bool] = True
    HAS_POLICY: ClassVar[bool] = True
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 60, "episodes": 8, "tokens": 2048, "judge_tokens": 8192, "updates": 64, "batch": 256, "hidden": 64, "lr": 3e-4,
        "over": 10.0, "under": 1.0, "cliff": 1.0,
    }  # fmt: skip

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
        return self._walk(self._learner(None), None)[0]

    def begin(self) -> State:
        """The allocation of the untrained (or given) policy, and the given starts."""
        learner = self._learner(None)
        starts = np.array([self.proposal(), *self.start])
        scores = self.objective.scores(starts, int(self.settings["judge_tokens"]), self.seed)
        best = int(np.argmin(scores.mean))
        empty = {"seen": np.zeros((0, _STATIC + 2)), "action": np.zeros(0), "return": np.zeros(0)}
        return {
            "choice": starts[best],
            "kl": scores.mean[best],
            "done": np.array(False),
            **empty,
            **_policy(learner),
        }

    def step(self, state: State, number: int) -> State:
        """One round of rollouts and learning."""
        rng, learner = self.rng(number), self._learner(state)
        seen, action, gain, choices, shares = [], [], [], [], []
        for episode in range(max(1, int(self.settings["episodes"]))):
            noise = rng.normal(size=len(self._first_unit)) if episode else None
            choice, states, actions, share = self._walk(learner, noise)
            seen.append(states)
            action.append(actions)
            choices.append(choice)
            shares.append(share)
        text = rng.integers(2**31, size=2).tolist()
        scores = self.objective.scores(np.array(choices), int(self.settings["tokens"]), text[0])
        for kl, share, actions in zip(scores.mean.tolist(), shares, action):
            gain.append(np.full(len(actions), self.reward(kl, share)))
        memory = {
            "seen": np.concatenate([state["seen"], *seen])[-_MEMORY:],
            "action": np.concatenate([state["action"], *action])[-_MEMORY:],
            "return": np.concatenate([state["return"], *gain])[-_MEMORY:],
        }
        for _ in range(int(self.settings["updates"])):
            at = rng.integers(len(memory["action"]), size=max(1, int(self.settings["batch"])))
            learner.update(memory["seen"][at], memory["action"][at], memory["return"][at], rng)
        two = np.stack([state["choice"], choices[int(np.argmin(scores.mean))]])
        judged = self.objective.scores(two, int(self.settings["judge_tokens"]), text[1])
        best = int(np.argmin(judged.mean))
        return {
            "choice": two[best],
            "kl": judged.mean[best],
            "done": np.array(False),
            **memory,
            **_policy(learner),
        }

    def reward(self, kl: float, share: float) -> float:
        """Of an episode: measured KL in nats, and the wanted bytes as a share of the budget."""
        if share > 1:
            return -kl - float(self.settings["over"]) * (share - 1) - float(self.settings["cliff"])
        return -kl - float(self.settings["under"]) * (1 - share)

    @property
    def _first_unit(self) -> np.ndarray:
        """(C,) the first unit of every class: its features stand for the class."""
        c = self.problem.classes
        first = np.full(len(c.bytes), -1)
        first[c.of_unit[::-1]] = np.arange(len(c.of_unit))[::-1]
        return first

    def _walk(
        self, learner: Sac, noise: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """One episode: choice (U,) within the budget, states (C, 11), actions (C,), wanted bytes over the budget."""
        p, c = self.problem, self.problem.classes
        assert self.features is not None
        static = self.features[self._first_unit]
        params = np.bincount(c.of_unit, weights=p.params, minlength=len(c.bytes))
        bits = np.where(c.allowed, c.bytes * 8 / params[:, None], np.nan)  # (C, F) effective bits
        low, high = np.nanmin(bits, axis=1), np.nanmax(bits, axis=1)
        states, actions = np.zeros((len(static), _STATIC + 2)), np.zeros(len(static))
        before, left, weights = 0.0, float(p.limit_bytes), float(params.sum())
        wanted = np.zeros(len(static))
        for i in range(len(static)):
            room = np.clip(left * 8 / weights / 8, -2.0, 4.0)
            states[i] = [*static[i], before / 8, room]
            actions[i] = learner.act(states[i : i + 1], None if noise is None else noise[i : i + 1])[0]
            wanted[i] = low[i] + (actions[i] + 1) / 2 * (high[i] - low[i])
            pick = int(np.nanargmin(np.abs(bits[i] - wanted[i])))
            before = float(bits[i, pick])
            left -= float(c.bytes[i, pick])
            weights = max(weights - params[i], 1.0)
        share = 1 - left / p.limit_bytes
        # The nearest allocation within the bytes, in squared bits weighted by the weights.
        cost = np.where(c.allowed, params[:, None] * (bits - wanted[:, None]) ** 2, np.inf)
        return c.expand(solve_costs(p, cost)), states, actions, share

    def _learner(self, state: State | None) -> Sac:
        """The networks as they were, from the state, the given policy, or fresh."""
        out = Sac(
            _STATIC + 2,
            max(1, int(self.settings["hidden"])),
            np.random.default_rng([self.seed, 10**6]),
            float(self.settings["lr"]),
        )
        arrays = self.policy if state is None else state
        known = {k.removeprefix("policy."): v for k, v in arrays.items() if k.startswith("policy.")}
        if known:
            try:
                out.restore(known)
            except (KeyError, ValueError) as e:
                raise UserError(
                    "the policy file does not fit", found=str(e), fix=f"the same --set hidden as it was trained with ({self.settings['hidden']} now)",
                ) from None  # fmt: skip
        elif state is None and self.policy:
            raise UserError("the policy file holds no policy", found=", ".join(list(self.policy)[:3]))
        return out


def _policy(learner: Sac) -> dict[str, np.ndarray]:
    return {f"policy.{k}": v for k, v in learner.arrays().items()}
