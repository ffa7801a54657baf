"""Searches on the real model against what they cost: held-out KL after every step, and the forward-equivalent tokens until then.

    python benchmarks/search_smollm2.py models/smollm2 --calibration CALIBRATION.txt --text HELD_OUT.txt --bits 3.5 \
        --searches refine,evopress,random_search,rco,ramp --seeds 0,1,2 --set evopress.steps=60 --set evopress.scale=0.125

One JSON line per search, seed and step is appended to benchmarks/results/search_smollm2.jsonl. Every search gets the same
problem, pool of text and quantised weights. Searches that need damages have the tokens of the Fisher projection on their
account from the start, the others begin at 0; a backward pass counts as two forward passes, and prefix reuse is not credited.
``path`` and ``refine`` begin with the exact knapsack's answer. The held-out text chooses nothing and its tokens are nobody's. Interrupted, it
goes on at the last step (state under --parts). The exact solutions of ``fisher`` and ``fisher_anchored`` are verified beside the ends.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitatlas.analysis.calibration import check_disjoint, make_calibration
from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import SensitivityTable, expand_formats
from bitatlas.analysis.unit_features import unit_features
from bitatlas.analysis.verify import Verifier
from bitatlas.cache.keys import digest
from bitatlas.cache.paths import atomic_write
from bitatlas.solvers import Problem, get_searcher, get_solver

FORMATS = "int{2,3,4,5,6,8}-g64"


def main() -> None:
    """Measure, search, write one line per step; say what each search needed to reach the KL of ``path``."""
    args = arguments()
    index, formats = index_model(args.model), expand_formats(FORMATS)
    ctx = MeasureContext(
        index,
        formats,
        text=args.calibration,
        tokens=args.measure_tokens,
        seq_len=128,
        seed=0,
        device=args.device,
    )
    metric = get_metric("fisher_projection")
    rows = run_metric(metric, ctx, Path(args.parts) / f"{index.digest[:12]}-{args.measure_tokens}")
    cost = metric.cost(ctx)
    paid = int(cost.forward_tokens + 2 * cost.backward_tokens)
    table, anchored = (
        SensitivityTable.from_rows([r for r in rows if r.metric == m], index.unit_keys())
        for m in ("fisher", "fisher_anchored")
    )
    pool = make_calibration(ctx.loaded.tokenizer, args.calibration, args.pool, args.seq_len, 0)
    held_out = make_calibration(ctx.loaded.tokenizer, args.text, args.tokens, args.seq_len, 0)
    check_disjoint(pool, held_out)
    common: dict[str, Any] = {
        "ram_bytes": int(args.ram_gib * 2**30), "batch_tokens": args.batch_tokens,
        "storage": torch.bfloat16 if args.bf16 else torch.float32,
    }  # fmt: skip
    loaded = ctx.loaded
    if args.bf16:
        loaded = LoadedModel.open(index, dtype=torch.bfloat16, device=args.device)
    engine = Evaluator(loaded, index.unit_keys(), formats, pool.tokens, **common)
    judge = Evaluator(loaded, index.unit_keys(), formats, held_out.tokens, **common)
    judge.weights = engine.weights  # made once for both
    finals: dict[str, np.ndarray] = {}
    for bits in args.bits:
        problem = Problem.build(index, table, formats, int(bits * index.params / 8))
        bare = Problem.build(index, None, formats, problem.limit_bytes)
        first = get_solver("mckp").solve(problem).choice
        reached: dict[str, list[tuple[int, float]]] = {}
        for name in args.searches:
            kind = get_searcher(name)
            needs = kind.NEEDS_DAMAGE or kind.NEEDS_SLOPES
            for seed in args.seeds:
                own = {k.split(".", 1)[1]: v for k, v in args.set if k.startswith(name + ".")}
                features = unit_features(engine) if kind.NEEDS_FEATURES else None
                search = kind(
                    problem if needs else bare, engine, seed=seed, settings=own, features=features,
                    start=first[None] if name in ("path", "refine") else None,
                )  # fmt: skip
                about = {
                    "search": name, "seed": seed, "bits": bits, "settings": {k: str(v) for k, v in search.settings.items()},
                    "model": index.digest[:16], "pool": pool.digest[:16], "held_out": held_out.digest[:16],
                    "measuring_tokens": paid if needs else 0,
                }  # fmt: skip
                curve, choice = run(search, engine, judge, about, args)
                finals[f"{name} {bits} seed {seed}"] = choice
                reached.setdefault(name, []).extend(curve)
        for name, points in reached.items():
            least = min(kl for _, kl in points)
            line = f"{bits} bits {name}: lowest KL {least:.4f}"
            if "path" in reached:
                goal = min(kl for _, kl in reached["path"])
                needed = [spent for spent, kl in points if kl <= goal]
                line += (
                    f", path's {goal:.4f} after {min(needed):,} tokens"
                    if needed
                    else f", never path's {goal:.4f}"
                )
            print(line)
        finals[f"fisher {bits}"] = first
        asked = Problem.build(index, anchored, formats, problem.limit_bytes)
        finals[f"fisher_anchored {bits}"] = get_solver("mckp").solve(asked).choice
    verify(ctx.loaded, index, held_out.tokens, [f.name for f in formats], finals, args)


def verify(
    loaded: LoadedModel,
    index: Any,
    tokens: np.ndarray,
    formats: list[str],
    finals: dict[str, np.ndarray],
    args: argparse.Namespace,
) -> None:
    """The last word on what each search ended with: float32, all held-out tokens, together."""
    keys = index.unit_keys()
    named = {n: {k: formats[int(j)] for k, j in zip(keys, c)} for n, c in finals.items()}
    verifier = Verifier(loaded, index, tokens, named, weights_gib=args.ram_gib)
    results = verifier.results({step: verifier.run(step) for step in verifier.steps()})
    with Path(args.out).open("a") as out:
        for name, r in results.items():
            record = {"final": name, "kl": r.kl_mean, "kl_stderr": r.kl_stderr, "kl_p99": r.kl_p99, "tokens": r.tokens, "model": index.digest[:16],
                      "torch": torch.__version__, "device": platform.machine()}  # fmt: skip
            out.write(json.dumps(record) + "\n")
            print(
                f"{name}: held-out KL {r.kl_mean:.4f} +- {r.kl_stderr:.4f}, {r.tokens:,} tokens", flush=True
            )


def run(search: Any, engine: Evaluator, judge: Evaluator, about: dict[str, Any], args: argparse.Namespace) -> tuple[list[tuple[int, float]], np.ndarray]:  # fmt: skip
    """One search, step by step: (forward-equivalents, held-out KL) after each, and the last choice."""
    known: dict[bytes, Any] = {}
    place = Path(args.parts) / f"{digest(about)}.npz"
    state: dict[str, np.ndarray] = {}
    if place.exists():
        with np.load(place, allow_pickle=False) as data:
            state = {k: data[k] for k in data.files}
    number = int(state.pop("bench.step", np.array(-1)))
    spent, seconds = float(state.pop("bench.spent", np.array(about["measuring_tokens"]))), float(state.pop("bench.seconds", np.array(0.0)))  # fmt: skip
    points = state.pop("bench.points", np.zeros((0, 2)))
    while number < search.steps and not bool(state.get("done", False)):
        number += 1
        before, start = engine.spent.forward_equivalents, time.process_time()
        state = search.begin() if number == 0 else search.step(state, number)
        spent += engine.spent.forward_equivalents - before
        seconds += time.process_time() - start
        key = np.asarray(state["choice"], np.int64).tobytes()
        if key not in known:
            known[key] = judge.scores(state["choice"], args.curve_tokens, 0)
        found = known[key]
        points = np.concatenate([points, [[spent, found.mean[0]]]])
        record = about | {
            "step": number, "forward_equivalents": int(spent), "kl": float(state["kl"]), "kl_held_out": float(found.mean[0]),
            "kl_held_out_stderr": float(found.stderr[0]), "payload_bytes": search.problem.payload(state["choice"]),
            "done": bool(state["done"]), "cpu_s": round(seconds, 2), "computed_share": engine.spent.computed_tokens / max(engine.spent.forward_tokens, 1),
            "device": str(engine.loaded.device) if engine.loaded.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
        }  # fmt: skip
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with Path(args.out).open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(f"{about['search']} seed {about['seed']} {search.STEP} {number}: {int(spent):,} tokens, KL {float(state['kl']):.4f}, "
              f"held out {found.mean[0]:.4f} +- {found.stderr[0]:.4f}", flush=True)  # fmt: skip
        buffer = io.BytesIO()
        np.savez(buffer, **state, **{"bench.step": np.array(number), "bench.spent": np.array(spent),
                                     "bench.seconds": np.array(seconds), "bench.points": points})  # fmt: skip
        atomic_write(place, buffer.getvalue())
    return [(int(t), float(kl)) for t, kl in points], np.asarray(state["choice"])


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to measure and to search on")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--bits", type=lambda s: [float(b) for b in s.split(",")], default=[3.5])
    parser.add_argument(
        "--searches",
        type=lambda s: s.split(","),
        default=["path", "refine", "evopress", "random_search", "rco", "ramp"],
    )
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0])
    parser.add_argument(
        "--set",
        action="append",
        type=lambda s: tuple(s.split("=", 1)),
        default=[],
        help="SEARCH.SETTING=VALUE",
    )
    parser.add_argument(
        "--measure-tokens", type=int, default=96 * 128, help="calibration tokens of the Fisher projection"
    )
    parser.add_argument("--pool", type=int, default=131072, help="tokens that minibatches are drawn from")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--ram-gib", type=float, default=6.0, help="for quantised weights")
    parser.add_argument(
        "--curve-tokens",
        type=int,
        default=4096,
        help="held-out tokens after each step; the ends are verified on all",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="search in bfloat16; the ends are verified in float32"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default="build/search_smollm2", help="folder of what can be resumed")
    parser.add_argument("--out", default="benchmarks/results/search_smollm2.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
