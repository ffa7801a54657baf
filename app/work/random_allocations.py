"""The truth about whole allocations: random ones, spread over a range of sizes, measured for real."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from bitatlas.analysis.calibration import CalibrationSet, load_tokenizer, make_calibration
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import ModelIndex, Provenance, UserError, parse_format
from bitatlas.analysis.trust import encode_choice
from bitatlas.analysis.truth import AllocationTruth
from bitatlas.app.jobs.work import Work
from bitatlas.app.work.checkpoint import loadable, unchanged
from bitatlas.app.work.parts import load_part, save_part
from bitatlas.cache.keys import digest, run_key
from bitatlas.cache.plans import Candidate
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem
from bitatlas.solvers.random_best import random_choice

__all__ = ["RandomAllocationsWork", "random_allocations"]

METRIC = "random_allocations"
_VERSION = 2


def random_allocations(index: ModelIndex, formats: list[str], n: int, low: float, high: float, seed: int) -> np.ndarray:  # fmt: skip
    """(N, U) choices whose average bits are spread evenly from ``low`` to ``high``, smallest first.

    Budget i is drawn inside the i-th of N equal stretches of the range that the formats can reach; every unit then
    draws its format independently from the distribution that meets the budget (`solvers.random_best`). Every other
    allocation draws from a window only: neighbouring formats, the window itself drawn among those that enclose the budget.
    All formats at once put a few units of any allocation at the fewest bits, where damage is far beyond what anybody would
    serve; windows give the allocations that solvers propose.

    Raises:
        UserError: the range holds no size that the formats can make.
    """
    wanted = [parse_format(f) for f in formats]
    sizes = index.bytes_table(wanted)
    least, most = (float(x.sum()) * 8 / index.params for x in (sizes.min(1), sizes.max(1)))
    first, last = max(low, least), min(high, most)
    if n < 1 or not first < last:
        raise UserError(f"no allocations between {low:g} and {high:g} bits can be made of these formats",
                        found=f"{', '.join(formats)} reach {least:.2f} to {most:.2f} bits per weight",
                        fix="name other formats or another range")  # fmt: skip
    rng = np.random.default_rng(seed)
    out = np.empty((n, len(index.units)), np.intp)
    problems: dict[bytes, Problem] = {}  # one for each window
    for i, share in enumerate((np.arange(n) + rng.random(n)) / n):
        limit = int(np.ceil((first + share * (last - first)) * index.params / 8))
        some = _window(sizes, limit, rng) if i % 2 else np.arange(len(wanted))
        if some.tobytes() not in problems:
            problems[some.tobytes()] = Problem.build(index, None, [wanted[f] for f in some], 0)
        problem = problems[some.tobytes()]
        out[i] = some[problem.classes.expand(random_choice(problem.with_limit(limit), rng))]
    return out


def _window(sizes: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Columns of ``sizes`` (U, F) that are neighbours in size and enclose ``limit`` bytes; all when none do."""
    total = sizes.sum(0)
    order = np.argsort(total, kind="stable")
    total = total[order]
    count = len(total)
    found = [
        (a, b)
        for a in range(count)
        for b in range(a + 1, count)
        if total[a] <= limit <= total[b] and b - a < count - 1
    ]
    if not found:
        return np.arange(count)
    a, b = found[int(rng.integers(len(found)))]
    return np.sort(order[a : b + 1])


class RandomAllocationsWork(Work):
    """Parameters are those of `app.tasks.truth.submit_random_allocations`. Each allocation becomes a candidate of the run:
    ``objective`` its KL, ``extra`` its choice, standard error, KL of every sequence, effective bits and noise floor.
    """

    KIND = METRIC

    @cached_property
    def index(self) -> ModelIndex:
        """The model, unchanged since the job was asked for."""
        return unchanged(self.params)

    @cached_property
    def choices(self) -> np.ndarray:
        """(N, U) the allocations."""
        p = self.params
        return random_allocations(self.index, p["formats"], p["n"], p["low"], p["high"], p["seed"])

    @cached_property
    def text(self) -> CalibrationSet:
        """The sequences to measure on."""
        p, source = self.params, loadable(self.index, self.home)
        return make_calibration(load_tokenizer(source.path), p["text"], p["tokens"], p["seq_len"], p["text_seed"],
                                vocab_size=source.vocab_size)  # fmt: skip

    @cached_property
    def truth(self) -> AllocationTruth:
        """The model in memory."""
        loaded = LoadedModel.open(loadable(self.index, self.home))
        return AllocationTruth(
            loaded, self.index.unit_keys(), [parse_format(f) for f in self.params["formats"]], self.text.tokens,
            cache_gib=self.params["cache_gib"],
        )  # fmt: skip

    @cached_property
    def key(self) -> str:
        """The run: the same text, formats, range, number and seed give the same allocations and the same KL."""
        p = self.params
        settings = {k: p[k] for k in ("n", "low", "high")}
        return run_key(p["digest"], METRIC, _VERSION, p["formats"], self.text.digest, settings, p["seed"])

    def plan(self) -> list[str]:
        """One step an allocation."""
        return [f"allocation {i}" for i in range(len(self.choices))]

    def runs(self) -> list[dict[str, Any]]:
        """One run without damage rows."""
        p, text = self.params, self.text
        provenance = Provenance(p["digest"], self.index.name, text.digest, text.size, p["seed"],
                                {"source": text.source, **text.settings})  # fmt: skip
        return [{"run": self.key, "model_digest": p["digest"], "metric": METRIC, "formats": p["formats"],
                 "calibration": text.digest, "settings": {k: p[k] for k in ("n", "low", "high")},
                 "provenance": provenance.to_dict()}]  # fmt: skip

    def run(self, key: str) -> dict[str, Any]:
        """One allocation: KL of every sequence, kept in a part file."""
        folder = self.home.runs(self.key)
        part = load_part(folder, key)
        if part is None:
            kl = self.truth.kl(self.choices[int(key.split()[1])])
            part = {"kl": kl, "noise": np.array([self._noise])}
            save_part(folder, key, part)
        return {"note": f"KL {part['kl'].mean():.4g}"}

    @cached_property
    def _noise(self) -> float:
        return self.truth.noise()

    def finish(self) -> dict[str, Any]:
        """The candidates, stored."""
        folder = self.home.runs(self.key)
        bits = self.index.bytes_table([parse_format(f) for f in self.params["formats"]])
        found = []
        for i, choice in enumerate(self.choices):
            part = load_part(folder, f"allocation {i}")
            if part is None:  # its file was lost after the step: measured again
                self.run(f"allocation {i}")
                part = load_part(folder, f"allocation {i}") or {}
            each = part["kl"]
            size = int(bits[np.arange(len(choice)), choice].sum())
            text = encode_choice(choice)
            extra = {
                "choice": text, "bits": size * 8 / self.index.params, "floor": float(part["noise"][0]),
                "stderr": float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else float("nan"),
                "sequences": [float(x) for x in each],
            }  # fmt: skip
            found.append(Candidate(digest(text), float(each.mean()), size, self.text.size, extra))
        Store(self.home).put_candidates(self.key, found)
        return {"run": self.key, "allocations": len(found), "tokens": self.text.size,
                "kl": [min(c.objective for c in found), max(c.objective for c in found)]}  # fmt: skip
