"""EvoPress: (1 + lambda) evolution on the real model with multi-step selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.level_switch import LevelSwitch
from bitatlas.solvers.searcher import Reading, Searcher, State

__all__ = ["EvoPress"]


class EvoPress(Searcher):
    """Offspring by level switches; few survive a short text, fewer a longer one, and in the last stage the parent competes.

    Settings: ``steps`` generations, ``offspring``, ``survivors`` and ``tokens`` of the stages (4/2/1), ``initial`` random
    starts scored on ``initial_tokens``; ``groups`` size | name | none; ``scale`` multiplies every number of tokens. The
    defaults are the published schedule for quantisation; its last stage wants a pool of at least 131 072 tokens.
    """

    NAME: ClassVar[str] = "evopress"
    TITLE: ClassVar[str] = "EvoPress"
    SOURCE: ClassVar[str] = (
        "Sieberling et al. 2025, EvoPress (ICML); level switch, multi-step selection, KL fitness"
    )
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 150, "offspring": 128, "survivors": (16, 4, 1), "tokens": (2048, 16384, 131072), "initial": 32,
        "initial_tokens": 2048, "groups": "size", "scale": 1.0,
    }  # fmt: skip

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """As everywhere, and the stages have to make sense."""
        out = super().checked(settings)
        if len(out["survivors"]) != len(out["tokens"]) or out["groups"] not in ("size", "name", "none"):
            raise UserError(
                "the schedule of EvoPress does not make sense",
                found=f"survivors {out['survivors']}, tokens {out['tokens']}, groups {out['groups']}",
                fix="as many survivors as tokens (16/4/1 and 2048/16384/131072); groups size, name or none",
            )
        return out

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        if step == 0:
            first = round(settings["initial_tokens"] * settings["scale"])
            return (Reading(first, starts or max(1, settings["initial"])),)
        alive, out = settings["offspring"], []
        for stage, (survivors, tokens) in enumerate(zip(settings["survivors"], settings["tokens"])):
            parent = stage == len(settings["tokens"]) - 1
            out.append(Reading(round(tokens * settings["scale"]), alive + parent))
            alive = min(alive, survivors)
        return tuple(out)

    def begin(self) -> State:
        """The best of the given starts, or of random ones, on the first text."""
        switch, rng = self._switch(), self.rng(0)
        c = self.problem.classes
        starts = [np.asarray(s) for s in self.start]
        while len(starts) < max(1, int(self.settings["initial"])) and not len(self.start):
            starts.append(c.expand(switch.formats(switch.random(rng))))
        scores = self.objective.scores(np.array(starts), self._tokens("initial_tokens"), self._text(0, 0))
        best = int(np.argmin(scores.mean))
        return {"choice": starts[best], "kl": scores.mean[best], "done": np.array(False)}

    def step(self, state: State, number: int) -> State:
        """One generation."""
        switch, rng = self._switch(), self.rng(number)
        c = self.problem.classes
        parent = np.asarray(state["choice"])
        level = switch.level(c.expand_back(parent))
        seen = {level.tobytes()}
        offspring: list[np.ndarray] = []
        for _ in range(20 * int(self.settings["offspring"])):
            if len(offspring) == int(self.settings["offspring"]):
                break
            child = switch.mutate(level, rng)
            if child.tobytes() not in seen:
                seen.add(child.tobytes())
                offspring.append(c.expand(switch.formats(child)))
        if not offspring:
            return {**state, "done": np.array(True)}
        alive = np.array(offspring)
        mean = np.array([])
        stages = list(zip(self.settings["survivors"], self.settings["tokens"]))
        for stage, (survivors, tokens) in enumerate(stages):
            last = stage == len(stages) - 1
            if last:
                alive = np.concatenate([alive, parent[None]])
            scores = self.objective.scores(alive, self._scaled(tokens), self._text(number, stage))
            keep = np.argsort(scores.mean, kind="stable")[: 1 if last else survivors]
            alive, mean = alive[keep], scores.mean[keep]
        return {"choice": alive[0], "kl": mean[0], "done": np.array(False)}

    def _switch(self) -> LevelSwitch:
        return LevelSwitch(self.problem, str(self.settings["groups"]))

    def _scaled(self, tokens: int) -> int:
        return max(1, round(tokens * float(self.settings["scale"])))

    def _tokens(self, name: str) -> int:
        return self._scaled(int(self.settings[name]))

    def _text(self, number: int, stage: int) -> int:
        """Seed of a stage's minibatch: fresh text in every stage of every generation."""
        return int(np.random.SeedSequence([self.seed, number, stage]).generate_state(1)[0])
