"""The refining job: an allocation improved on the real model, round by round, accepted only where measured KL falls.

Half of the calibration sequences give the slopes, the other half judges: a change is kept only when the KL of the judging
half falls. The held-out text of a verification is neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.operating_point import OperatingPoint
from bitatlas.analysis.schema import Allocation, ModelIndex, UserError, parse_format
from bitatlas.app.jobs.work import Work
from bitatlas.app.work.checkpoint import loadable, unchanged
from bitatlas.cache.keys import digest
from bitatlas.cache.paths import atomic_write
from bitatlas.cache.store import Store
from bitatlas.kernels.reference import quantize_dequantize
from bitatlas.solvers import Problem, certify, choice_of, get_solver

__all__ = ["RefineWork"]

_TRIES = 4
_STEP = 1.6  # by how much the step is made shorter or longer between tries


class RefineWork(Work):
    """Parameters are those of `app.tasks.refining.submit_refine`."""

    KIND = "refine"

    @cached_property
    def index(self) -> ModelIndex:
        """The model, unchanged since the job was asked for."""
        return unchanged(self.params)

    @cached_property
    def start(self) -> Allocation:
        """The allocation to begin with."""
        return Store(self.home).allocation(self.params["allocation"])

    @cached_property
    def problem(self) -> Problem:
        """The same problem that the start solved: table, pins, ties, budget."""
        table = (
            Store(self.home)
            .table(self.params["run"], self.start.metric, self.index.unit_keys())
            .select(self.params["formats"])
        )
        budget = self.start.budget
        limit = (budget.weights_bytes if budget else self.start.weights_bytes) - self.index.kept_bytes
        formats = [parse_format(f) for f in self.params["formats"]]
        return Problem.build(self.index, table, formats, limit, pins=self.start.pins)

    @cached_property
    def points(self) -> tuple[OperatingPoint, OperatingPoint]:
        """Slopes on the first half of the sequences, judgement on the second."""
        p, source = self.params, loadable(self.index, self.home)
        text = make_calibration(
            load_tokenizer(source.path),
            p["calibration"],
            p["tokens"],
            p["seq_len"],
            p["seed"],
            vocab_size=source.vocab_size,
        )
        loaded = LoadedModel.open(source)
        formats = [parse_format(f) for f in self.problem.formats]
        half = max(1, len(text.tokens) // 2)
        if len(text.tokens) < 2:
            raise UserError(
                "refining needs at least two sequences", found=f"{len(text.tokens)}", fix="more --tokens"
            )
        keys = self.index.unit_keys()
        return OperatingPoint(loaded, keys, formats, text.tokens[:half]), OperatingPoint(
            loaded, keys, formats, text.tokens[half:]
        )

    def plan(self) -> list[str]:
        """``start``, then one step a round."""
        return ["start", *(f"round {i}" for i in range(self.params["rounds"]))]

    def run(self, key: str) -> dict[str, Any]:
        """One round; its state is a file, so that a killed job goes on from the last round."""
        keys = self.plan()
        at = keys.index(key)
        path = self._state(key)
        if not path.exists():
            state = (
                self._begin() if at == 0 else self._round(json.loads(self._state(keys[at - 1]).read_text()))
            )
            atomic_write(path, json.dumps(state).encode())
        state = json.loads(path.read_text())
        return {"note": f"{key}: KL {state['kl']:.4f}, {state['changed']} units changed"}

    def _state(self, key: str) -> Any:
        return self.home.runs("refine-" + digest(self.params)) / f"{key.replace(' ', '-')}.json"

    def _named(self, choice: np.ndarray) -> dict[str, str]:
        return {u: self.problem.formats[j] for u, j in zip(self.problem.units, choice.tolist())}

    def _begin(self) -> dict[str, Any]:
        """The better of two starts: as given, and solved again with damages scaled to what whole uniform models measure."""
        judge, problem = self.points[1], self.problem
        given = choice_of(problem, self.start.formats)
        best = {
            "choice": given.tolist(),
            "kl": judge.kl(self._named(given)),
            "changed": 0,
            "step": 2.0,
            "done": False,
        }
        best["before"] = best["kl"]
        scale = np.ones(len(problem.formats))
        for j, name in enumerate(problem.formats):
            predicted = float(np.nansum(problem.damage[:, j]))
            if parse_format(name).kind == "int" and np.isfinite(problem.damage[:, j]).all() and predicted > 0:
                scale[j] = judge.kl(dict.fromkeys(problem.units, name)) / predicted
        # Cheaper formats never get a better word than dearer ones: noise at tiny KL must not turn the order round.
        scale = np.maximum.accumulate(scale[::-1])[::-1]
        scaled = Problem.of(problem.damage * scale, problem.bytes, problem.limit_bytes, units=problem.units, formats=problem.formats,
                            ties=problem.ties, pins=problem.pins, allowed=problem.allowed)  # fmt: skip
        other = get_solver("mckp").solve(scaled).choice
        kl = judge.kl(self._named(other))
        if kl < best["kl"]:
            best |= {"choice": other.tolist(), "kl": kl, "changed": int((other != given).sum())}
        return best

    def _round(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """One linearisation, and the longest step from it that the judging half confirms."""
        if state["done"]:
            return {**state, "changed": 0}
        learner, judge = self.points
        now = np.array(state["choice"])
        slopes = learner.slopes(self._named(now))
        # Squared distance to damage: the metric's own isotropic curvature, unit by unit.
        curvature = self._curvature[:, None] * np.where(np.isfinite(slopes.squared), slopes.squared, 0.0)
        step, tried = float(state["step"]), []
        for _ in range(_TRIES):
            other = self._solve(slopes.first + step * curvature)
            changed = int((other != now).sum())
            if changed == 0:
                step /= _STEP
                continue
            kl = judge.kl(self._named(other))
            tried.append(kl)
            if kl < state["kl"]:
                return {**state, "choice": other.tolist(), "kl": kl, "changed": changed, "step": step}
            step *= _STEP**1.5
        return {**state, "changed": 0, "step": step, "done": bool(tried)}

    @cached_property
    def _curvature(self) -> np.ndarray:
        """(U,) damage per squared error, from the table's formats: ½ tr F / n where the metric is a KL."""
        loaded, values = self.points[0].loaded, []
        column = int(np.argsort(np.nansum(self.problem.damage, 0))[len(self.problem.formats) // 2])
        fmt = parse_format(self.problem.formats[column])
        for i, u in enumerate(self.problem.units):
            weight = loaded.handle(u).get()
            error = float((quantize_dequantize(weight, fmt) - weight).pow(2).sum())
            values.append(self.problem.damage[i, column] / error if error > 0 else 0.0)
        return np.nan_to_num(np.array(values))

    def _solve(self, change: np.ndarray) -> np.ndarray:
        """The exact best set of changes within the budget, under the pins and ties of the problem."""
        reachable = np.isfinite(change) & self.problem.allowed
        damage = np.where(reachable, change, np.nan)
        damage = damage - np.nanmin(damage, axis=1, keepdims=True)
        p = self.problem
        local = Problem.of(
            damage, p.bytes, p.limit_bytes, units=p.units, formats=p.formats, ties=p.ties, allowed=reachable
        )
        return get_solver("mckp").solve(local).choice

    def finish(self) -> dict[str, Any]:
        """The refined allocation, stored; its prediction is the KL of the judging half."""
        last = json.loads(self._state(self.plan()[-1]).read_text())
        choice = np.array(last["choice"])
        proof = certify(self.problem, choice)
        learner, judge = self.points
        settings = {**self.start.provenance.settings, "refined": {
            "from": self.params["allocation"], "kl_before": last["before"], "kl": last["kl"], "rounds": self.params["rounds"],
            "tokens": self.params["tokens"], "forward_tokens": learner.forward_tokens + judge.forward_tokens,
            "backward_tokens": learner.backward_tokens}}  # fmt: skip
        refined = replace(
            self.start, formats=self._named(choice), payload_bytes=proof.payload_bytes,
            bits_per_weight=proof.payload_bytes * 8 / self.index.params, predicted=last["kl"], status="feasible",
            solver=f"{self.start.solver}+refine", lower_bound=float("nan"), gap=float("nan"),
            provenance=replace(self.start.provenance, settings=settings),
        )  # fmt: skip
        return {"allocation": Store(self.home).put_allocation(refined), "kl_before": last["before"], "kl": last["kl"],
                "changed": sum(self.start.formats[u] != f for u, f in refined.formats.items())}  # fmt: skip
