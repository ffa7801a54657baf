"""The search job: one step per generation; every candidate that the real model scored is a row in the store."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.numpy import load_file, save

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import (
    MEASURED_KL,
    Allocation,
    Budget,
    Frontier,
    ModelIndex,
    Provenance,
    Spent,
    parse_format,
)
from bitatlas.app.expert_rules import ExpertRules
from bitatlas.app.jobs.work import Work
from bitatlas.app.tasks.searching import search_problem, search_run, start_notes, text_notes
from bitatlas.app.tasks.solving import in_own_bytes
from bitatlas.app.work.checkpoint import loadable, unchanged
from bitatlas.app.work.parts import load_part, save_part
from bitatlas.app.work.recorder import Recorder, unpacked_choice
from bitatlas.cache.paths import atomic_write
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, Searcher, certify, choice_of, get_searcher

__all__ = ["SearchWork"]

_DISK_BYTES = 16 << 30


class SearchWork(Work):
    """Parameters are those of `app.tasks.searching.submit_search`."""

    KIND = "search"

    @cached_property
    def index(self) -> ModelIndex:
        """The model, unchanged since the job was asked for."""
        return unchanged(self.params)

    @cached_property
    def problem(self) -> Problem:
        """The same problem that `bitatlas solve` would solve."""
        return search_problem(self.params, self.index, self.home)

    @cached_property
    def objective(self) -> Recorder:
        """The real model, on a GPU where there is one; quantised weights in at most 40 % of the free memory."""
        p, source = self.params, loadable(self.index, self.home)
        text = make_calibration(
            load_tokenizer(source.path),
            p["calibration"],
            p["tokens"],
            p["seq_len"],
            p["seed"],
            vocab_size=source.vocab_size,
        )
        cuda = torch.cuda.is_available()
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[p["precision"]]
        loaded = LoadedModel.open(source, dtype=dtype, device="cuda" if cuda else "cpu")
        free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
        folder = self.home.folder("artifacts", "candidates", self.index.digest[:16])
        room = min(_DISK_BYTES, psutil.disk_usage(str(folder)).free // 4)
        evaluator = Evaluator(
            loaded, self.problem.units, [parse_format(f) for f in self.problem.formats], text.tokens,
            ram_bytes=int(0.4 * free), logits_bytes=int(0.1 * free), storage=dtype, folder=folder, disk_bytes=room,
        )  # fmt: skip
        return Recorder(evaluator, self.problem)

    @cached_property
    def searcher(self) -> Searcher:
        """The algorithm with its settings."""
        p, kind, features = self.params, get_searcher(self.params["solver"]), None
        store = Store(self.home)
        starts = [choice_of(self.problem, store.allocation(key).formats) for key in p["start"]]
        policy = load_file(p["policy"]) if p["policy"] else None
        if kind.NEEDS_FEATURES:
            from bitatlas.analysis.unit_features import unit_features

            features = unit_features(self.objective.evaluator)
        return kind(
            self.problem, self.objective, seed=p["seed"], settings=p["settings"],
            start=np.array(starts) if starts else None, features=features, policy=policy,
        )  # fmt: skip

    @property
    def _run_id(self) -> str:
        return search_run(self.params)

    def plan(self) -> list[str]:
        """``start``, then one step per generation."""
        kind = get_searcher(self.params["solver"])
        steps = int(kind.checked(self.params["settings"])["steps"])
        return ["start", *(f"{kind.STEP} {i}" for i in range(1, steps + 1))]

    def run(self, key: str) -> dict[str, Any]:
        """One step; its state is a file, so that a killed job goes on from the last one."""
        state = self._state(self.plan().index(key))
        tokens = int(state["spent"][0] + 2 * state["spent"][1])
        ended = ", nothing more to gain" if bool(state["done"]) else ""
        return {"note": f"KL {float(state['kl']):.4f} after {tokens:,} forward-equivalent tokens{ended}"}

    def _state(self, number: int) -> dict[str, np.ndarray]:
        """The state after a step, from its file, or computed from the step before."""
        folder, key = self.home.runs(self._run_id), self.plan()[number]
        found = load_part(folder, key)
        if found is not None:
            return found
        before = self._state(number - 1) if number else None
        if before is not None and bool(before["done"]):
            state = dict(before)
        else:
            known = before["spent"] if before is not None else np.zeros(4)
            started, clock = self.objective.spent, time.perf_counter()
            state = self.searcher.begin() if before is None else self.searcher.step(before, number)
            state = {k: np.asarray(v) for k, v in state.items()}
            state["spent"] = known + _numbers(self.objective.spent.minus(started))
            # Old part files do not know it.
            state["seconds"] = (
                time.perf_counter() - clock + np.asarray(before.get("seconds", np.nan) if before else 0.0)
            )
            rows = self.objective.take(number, int(known[0] + 2 * known[1]))
            Store(self.home).put_candidates(self._run_id, rows)
        save_part(folder, key, state)
        return state

    def finish(self) -> dict[str, Any]:
        """The best allocation and the front of all candidates, stored; a learned policy as files."""
        p, store = self.params, Store(self.home)
        last = self._state(len(self.plan()) - 1)
        choice, kl = np.asarray(last["choice"]), float(last["kl"])
        proof, forward, backward = certify(self.problem, choice), int(last["spent"][0]), int(last["spent"][1])
        if not proof.feasible:
            raise RuntimeError(f"{p['solver']} broke its limits: {'; '.join(proof.violations[:3])}")
        rules = ExpertRules.of(p.get("experts"))
        told = {
            "kl": kl, "kl_stderr": float(last.get("stderr", np.nan)), "kl_before": float(last.get("before", np.nan)),
            "forward_tokens": forward, "backward_tokens": backward, "forward_equivalents": forward + 2 * backward,
            "computed_tokens": float(last["spent"][2]), "evaluations": int(last["spent"][3]), "from": list(p["start"]),
            "settings": p["settings"], "candidates": self._run_id,
            "notes": text_notes(p["solver"], p["tokens"], p["settings"], len(p["start"])) + start_notes(self.problem, p["start"], store),
        }  # fmt: skip
        settings = {"run": p["run"], "metric": p["metric"], "formats": list(p["formats"]), "solver": p["solver"], "target": p["target"],
                    "refined" if p["solver"] == "refine" else "search": told} | (rules.settings() if rules else {})  # fmt: skip
        found = Allocation(
            model_digest=self.index.digest, model_name=self.index.name,
            formats={u: self.problem.formats[j] for u, j in zip(self.problem.units, choice.tolist())},
            payload_bytes=proof.payload_bytes, kept_bytes=self.index.kept_bytes,
            bits_per_weight=proof.payload_bytes * 8 / self.index.params, predicted=kl, metric=MEASURED_KL,
            solver=p["label"], status="feasible", budget=Budget(**p["budget"]), pins=dict(self.problem.pins),
            provenance=Provenance(model_digest=self.index.digest, model_name=self.index.name, seed=p["seed"], settings=settings),
            kv={int(i): (k, v) for i, (k, v) in p.get("kv", {}).items()}, **p.get("kv_layout", {}),
        )  # fmt: skip
        found = in_own_bytes(found, self.index)
        key = store.put_allocation(found)
        front = replace(
            self._front(store, choice, kl), seconds=float(last.get("seconds", np.nan)),
            evaluations=told["evaluations"], tokens=told["forward_equivalents"],
        )  # fmt: skip
        result = {
            "allocation": key,
            "frontier": store.put_frontier(self.index.digest, front, self._run_id),
            **told,
        }
        policy = {k: v for k, v in last.items() if k.startswith("policy.")}
        if policy:
            result["policy"] = str(self._save_policy(policy))
        return result

    def _front(self, store: Store, choice: np.ndarray, kl: float) -> Frontier:
        """The candidates scored on the longest text that no other one dominates in bytes and KL."""
        rows = store.candidates(self._run_id)
        most = max((c.tokens for c in rows), default=0)
        points = [
            (c.payload_bytes, c.objective, unpacked_choice((c.extra or {})["choice"]))
            for c in rows
            if c.tokens == most
        ]
        points.append((self.problem.payload(choice), kl, choice))
        best: list[tuple[int, float, np.ndarray]] = []
        for point in sorted(points, key=lambda x: (x[0], x[1])):
            if not best or point[1] < best[-1][1]:
                best.append(point)
        return Frontier(
            self.problem.units, self.problem.formats, np.array([b[0] for b in best]), np.array([b[1] for b in best]),
            np.array([b[2] for b in best], np.uint8), MEASURED_KL, self.params["solver"],
        )  # fmt: skip

    def _save_policy(self, policy: dict[str, np.ndarray]) -> Path:
        """``policy.safetensors`` and a JSON beside it that says what it is."""
        folder = self.home.folder("artifacts", "policies")
        path = folder / f"{self._run_id}.safetensors"
        atomic_write(path, save({k: np.array(v) for k, v in policy.items()}))
        about = {"solver": self.params["solver"], "trained_on": self.index.name, "model_digest": self.index.digest,
                 "formats": list(self.problem.formats), "settings": self.params["settings"], "seed": self.params["seed"],
                 "features": 11}  # fmt: skip
        atomic_write(path.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
        return path


def _numbers(spent: Spent) -> np.ndarray:
    return np.array(
        [spent.forward_tokens, spent.backward_tokens, spent.computed_tokens, spent.evaluations], np.float64
    )
