"""Every allocator on one model at the same bytes: measured KL on held-out text, and what each had cost in tokens and seconds.

    python benchmarks/allocators.py models/smollm2 --calibration CALIBRATION.txt --text HELD_OUT.txt --bits 3.0,3.3,3.5,3.9,4.3 --seeds 0,1,2

A seed draws the calibration sequences of the metrics, the labels of the Fisher and the minibatches of the searches; the held-out
text is the same for all and chooses nothing. ``tokens`` are forward-equivalents (a backward pass counts two forward passes, prefix
reuse is not credited): of the metric that the allocation came from, plus the search's own. One JSON line per allocator, budget and
seed is appended to benchmarks/results/allocators.jsonl as soon as it is verified; lines that are there are not measured again.
The searches get as many tokens as path descent takes; to the end of EvoPress's curve goes benchmarks/search_smollm2.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bitatlas.analysis.calibration import check_disjoint, make_calibration
from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.fisher.matrix import ProbeMatrix, load_probes
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import NO_FORMAT, ModelIndex, SensitivityTable, UserError, expand_formats
from bitatlas.analysis.unit_features import unit_features
from bitatlas.analysis.verify import Verifier
from bitatlas.app.expert_rules import expert_ties
from bitatlas.app.tasks.interaction import with_interaction
from bitatlas.solvers import Problem, get_searcher, get_solver


class Entry(NamedTuple):
    """One row of the comparison: a value of a metric and the allocator that reads it; ``tied``: all experts of a layer alike."""

    metric: str
    value: str
    solver: str
    tied: bool = False

    @property
    def label(self) -> str:
        """As in the results."""
        words = [w for w in (self.value, self.solver, "one format a layer" if self.tied else "") if w]
        return " + ".join(words)


DENSE = (
    Entry("", "", "uniform"),
    Entry("", "", "first_last"),
    Entry("", "", "attention_high"),
    Entry("", "", "q4_k_m"),
    Entry("weight_error", "weight_error", "mckp"),
    Entry("alphaq", "alphaq", "mckp"),
    Entry("alphaq", "alphaq", "alphaq"),
    Entry("lim", "lim", "threshold"),
    Entry("zd", "zd", "threshold"),
    Entry("slim_salience", "slim_uniform", "mckp"),
    Entry("slim_salience", "slim_uniform", "double_pointer"),
    Entry("slim_salience", "slim_salience", "double_pointer"),
    Entry("activation_error", "activation_error", "mckp"),
    Entry("fisher_projection", "fisher_trace", "mckp"),
    Entry("fisher_projection", "fisher_projection", "mckp"),
    Entry("fisher_projection", "fisher", "mckp"),
    Entry("fisher_projection", "fisher_scaled", "mckp"),
    Entry("fisher_projection", "fisher_scaled", "path"),
    Entry("fisher_projection", "fisher_anchored", "mckp"),
    Entry("fisher_projection", "fisher_anchored", "path"),
    Entry("fisher_projection", "fisher", "ilp"),
    Entry("fisher_projection", "fisher", "hull"),
    Entry("fisher_projection", "fisher", "baq"),
    Entry("fisher_projection", "fisher", "bisection"),
    Entry("fisher_projection", "fisher", "projection_descent"),
    Entry("fisher_projection", "fisher", "random_best"),
    Entry("fisher_projection", "fisher", "tpe"),
    Entry("fisher_projection", "fisher", "nsga2"),
    Entry("fisher_projection", "fisher", "path walk"),
    Entry("fisher_projection", "fisher", "path"),
)
# Searches on the real model, stopped at the first step after which they have spent --search-tokens; schedules that run over all
# of a search's steps are scaled to end there.
SEARCHES: dict[Entry, dict[str, Any]] = {
    Entry("", "", "random_search"): {"steps": 10**6},
    Entry("", "", "evopress"): {"steps": 10**6, "offspring": 16, "survivors": (4, 1), "tokens": (512, 2048), "initial": 16, "groups": "none"},
    Entry("", "", "nsga2_search"): {"steps": 10**6, "tokens": 1024},
    Entry("fisher_projection", "fisher_scaled", "rco"): {"steps": 50, "tokens": 512, "judge_every": 25},
    Entry("", "", "ramp"): {"steps": 10**6},
    Entry("fisher_projection", "fisher_scaled", "refine"): {"steps": 10**6, "tokens": 2048},
}  # fmt: skip
EXPERTS = (
    Entry("fisher_projection", "fisher", "mckp", True),
    Entry("expert_error", "expert_error", "pmq"),
    Entry("expert_error", "expert_error", "pmq_global"),
)


def main() -> None:
    """Measure, allocate, verify; a line each."""
    args = arguments()
    index, formats = index_model(args.model), expand_formats(args.formats)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    loaded = LoadedModel.open(index, dtype=dtype)
    held_out = make_calibration(loaded.tokenizer, args.text, args.tokens, args.verify_seq_len, 0)
    pool = make_calibration(loaded.tokenizer, args.calibration, args.pool, args.seq_len, 0)
    check_disjoint(pool, held_out)
    engine = Evaluator(
        loaded, index.unit_keys(), formats, pool.tokens, storage=dtype, ram_bytes=int(args.ram_gib * 2**30)
    )
    about = {
        "model": index.digest[:16], "name": index.name, "formats": args.formats, "held_out": held_out.digest[:16], "held_out_tokens": args.tokens,
        "measure_tokens": args.measure_tokens, "dtype": str(dtype).split(".")[-1], "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "device": platform.machine(), "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    known = finished(Path(args.out), about)
    entries = [
        e
        for e in (*DENSE, *SEARCHES, *(EXPERTS if index.n_experts else ()))
        if not args.only or {e.solver, e.label} & set(args.only)
    ]
    for seed in args.seeds:
        tables = Tables(args, index, formats, seed)
        for bits in args.bits:
            todo = [
                e for e in entries
                if (e.label, bits, seed) not in known and (seed == args.seeds[0] or {e.solver, e.label} & set(args.seeded))
            ]  # fmt: skip
            made = list(allocations(todo, tables, engine, bits, seed, args.search_tokens))
            for record, kl in verified(made, loaded, index, held_out.tokens, [f.name for f in formats], args):
                append(Path(args.out), about | record | kl | {"bits_asked": bits, "seed": seed})


class Tables:
    """The metrics of one seed, measured when first asked for."""

    def __init__(self, args: argparse.Namespace, index: ModelIndex, formats: list[Any], seed: int) -> None:
        self.index, self.formats, self._args = index, formats, args
        self.ctx = MeasureContext(
            index, formats, text=args.calibration, tokens=args.measure_tokens, seq_len=args.seq_len, seed=seed
        )
        self._rows: dict[str, list[Any]] = {}

    def folder(self, metric: str) -> Path:
        """Of a metric's part files."""
        ctx = self.ctx
        return (
            Path(self._args.parts)
            / f"{self.index.digest[:12]}-{metric}-{ctx.calibration.digest[:12]}-{ctx.seed}"
        )

    def table(self, metric: str, value: str) -> SensitivityTable:
        """One value of a metric."""
        if metric not in self._rows:
            self._rows[metric] = run_metric(get_metric(metric), self.ctx, self.folder(metric))
        rows = [r for r in self._rows[metric] if r.metric == value]
        return SensitivityTable.from_rows(rows, self.index.unit_keys())

    def tokens(self, metric: str) -> int:
        """Forward-equivalents of measuring it."""
        cost = get_metric(metric).cost(self.ctx)
        return int(cost.forward_tokens + 2 * cost.backward_tokens)

    def probes(self) -> ProbeMatrix:
        """Of the Fisher projection."""
        return load_probes(self.folder("fisher_projection"))


def allocations(
    entries: list[Entry], tables: Tables, engine: Evaluator, bits: float, seed: int, search_tokens: float
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """What each entry proposes at a budget: facts and choice (U,). What does not apply is told and left out."""
    index, limit = tables.index, int(bits * tables.index.params / 8)
    for e in entries:
        table = tables.table(e.metric, e.value) if e.metric else None
        paid = tables.tokens(e.metric) if e.metric else 0
        ranked = table is not None and table.formats == (NO_FORMAT,)
        problem = Problem.build(
            index, None if ranked else table, tables.formats, limit, ties=expert_ties(index, "layer" if e.tied else "free")
        )  # fmt: skip
        if table is not None and ranked:
            problem = problem.with_score(table)
        start, before = time.process_time(), engine.spent.forward_equivalents
        facts: dict[str, Any] = {}
        try:
            if e.solver.startswith("path"):
                choice = searched(problem, engine, seed, e.solver == "path walk")
                facts = {"prior": get_searcher("path").SETTINGS["prior"]}
            elif e in SEARCHES:
                choice = limited(e, problem, engine, seed, search_tokens - paid)
            else:
                solver = get_solver(e.solver)
                if solver.USES_INTERACTION:
                    problem = with_interaction(problem, tables.probes())
                solution = solver.solve(problem, seed=seed, time_limit_s=60.0)
                choice = solution.choice
                facts = {"status": solution.status, "gap": solution.certificate.gap}
        except UserError as error:
            print(f"{e.label} at {bits}: {error}", flush=True)
            continue
        paid += int(engine.spent.forward_equivalents - before)
        facts |= {
            "allocator": e.label, "solver": e.solver, "tokens": paid, "solve_cpu_s": round(time.process_time() - start, 2),
            "payload_bytes": problem.payload(choice), "limit_bytes": limit, "predicted": problem.objective(choice) if problem.has_damage else None,
        }  # fmt: skip
        yield facts, choice


def limited(entry: Entry, problem: Problem, engine: Evaluator, seed: int, tokens: float) -> np.ndarray:
    """What a search has found when it has spent ``tokens``, or at its own end."""
    kind, before = get_searcher(entry.solver), engine.spent.forward_equivalents
    start = get_solver("mckp").solve(problem).choice[None] if kind.NEEDS_DAMAGE else None
    features = unit_features(engine) if kind.NEEDS_FEATURES else None
    search = kind(problem, engine, seed=seed, settings=SEARCHES[entry], start=start, features=features)
    return np.asarray(search.run(lambda: engine.spent.forward_equivalents - before >= tokens)["choice"])


def searched(problem: Problem, engine: Evaluator, seed: int, walk: bool) -> np.ndarray:
    """Path descent to its own end, or its walk alone."""
    kind = get_searcher("path")
    settings = {"steps": kind.SETTINGS["stages"]} if walk else {}
    start = get_solver("mckp").solve(problem).choice[None]
    search = kind(problem, engine, seed=seed, settings=settings, start=start)
    return np.asarray(search.run()["choice"])


def verified(
    made: list[tuple[dict[str, Any], np.ndarray]], loaded: LoadedModel, index: ModelIndex, tokens: np.ndarray,
    formats: list[str], args: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:  # fmt: skip
    """The facts again, with the measured KL; equal choices are verified once."""
    distinct = {choice.tobytes(): choice for _, choice in made}
    if not distinct:
        return
    keys = index.unit_keys()
    named = {str(i): {k: formats[int(j)] for k, j in zip(keys, c)} for i, c in enumerate(distinct.values())}
    verifier = Verifier(loaded, index, tokens, named, weights_gib=args.ram_gib)
    results = verifier.results({step: verifier.run(step) for step in verifier.steps()})
    number = {key: str(i) for i, key in enumerate(distinct)}
    for facts, choice in made:
        r = results[number[choice.tobytes()]]
        yield facts, {"kl": r.kl_mean, "kl_stderr": r.kl_stderr, "kl_p99": r.kl_p99, "top1_flips": r.top1_flips,
                      "ppl_before": r.ppl_before, "ppl_after": r.ppl_after, "noise_floor": r.noise_floor}  # fmt: skip


def finished(path: Path, about: dict[str, Any]) -> set[tuple[str, float, int]]:
    """(allocator, bits, seed) of the lines that say the same of model, text and formats."""
    same = ("model", "formats", "held_out", "held_out_tokens", "measure_tokens", "dtype")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        (r["allocator"], r["bits_asked"], r["seed"]) for r in lines if all(r[k] == about[k] for k in same)
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """One line of the results, and one for the person who waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(f"{record['bits_asked']} bits, seed {record['seed']}, {record['allocator']}: KL {record['kl']:.4f} +- {record['kl_stderr']:.4f}, "
          f"{record['tokens']:,} tokens, {record['solve_cpu_s']} s", flush=True)  # fmt: skip


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda s: s.split(",")  # noqa: E731 - a converter of argparse
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to measure and to search on")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--formats", default="int{2,3,4,5,6,8}-g64")
    parser.add_argument(
        "--bits", type=lambda s: [float(b) for b in s.split(",")], default=[3.0, 3.3, 3.5, 3.9, 4.3]
    )
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--seeded",
        type=names,
        default=["path", "path walk", "mckp"],
        help="solvers or rows that run with every seed; the others with the first",
    )
    parser.add_argument("--only", type=names, default=[], help="only these solvers or rows")
    parser.add_argument(
        "--measure-tokens", type=int, default=96 * 128, help="calibration tokens of each metric"
    )
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument(
        "--pool", type=int, default=65536, help="tokens that the searches' minibatches are drawn from"
    )
    parser.add_argument(
        "--search-tokens",
        type=float,
        default=350_000,
        help="forward-equivalents of a search, its metric's included",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--verify-seq-len", type=int, default=256)
    parser.add_argument("--ram-gib", type=float, default=6.0, help="for quantised weights")
    parser.add_argument(
        "--bf16", action="store_true", help="search and verify in bfloat16 (metrics stay in float32)"
    )
    parser.add_argument("--parts", default="build/allocators", help="folder of the metrics' part files")
    parser.add_argument("--out", default="benchmarks/results/allocators.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
