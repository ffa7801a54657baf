"""K/V pairs of every layer by KVTuner's recipe and by sums of damages, at the same bytes of cache: the KL measured.

    python benchmarks/kv_pairs.py MODEL --calibration CALIBRATION.txt --text HELD_OUT.txt
    python benchmarks/kv_pairs.py demo

The weights stay as they are. Each metric of the cache is solved by its sum (`mckp`) and by pruning, clustering and searching
(`kvtuner`); the budgets are what uniform pairs take, which stand beside them. Every position reads K and V as a decoding step would.
``tokens`` are forward-equivalents of the metric. Appends one JSON line per plan and budget to benchmarks/results/kv_pairs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from bitatlas.analysis.calibration import make_calibration
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.schema import KvLayout, KvTable, UserError, parse_pair
from bitatlas.analysis.verify import verify_many
from bitatlas.app import tasks
from bitatlas.app.tasks.measuring import calibration_file
from bitatlas.kernels.formats import expand_formats
from bitatlas.solvers import get_solver
from bitatlas.solvers.joint import kv_problem

VALUES = {  # metric -> its values that tell pairs apart
    "kv_error": ("kv_error",),  # of the attention output, as KVTuner ranks pairs
    "kv_output": ("kv_output",),
    "kv_fisher": ("kv_fisher",),
    "kv_flip": ("kv_flip",),
}
UNIFORM = ("kv2-channel/kv2-token", "kv4-channel/kv2-token", "kv4-channel/kv4-token", "kv8-channel/kv4-token")


def main() -> None:
    """Measure, solve, verify, append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration")
    parser.add_argument("--text", help="held-out text")
    parser.add_argument(
        "--metrics",
        type=lambda s: s.split(","),
        default=list(VALUES),
        help="of kv_error, kv_output, kv_fisher, kv_flip",
    )
    parser.add_argument("--measure-tokens", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--context", type=int, default=2048, help="that the budgets are counted at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/kv_pairs.jsonl")
    args = parser.parse_args()
    index = tasks.open_index(args.model)
    if index.kv is None:
        raise UserError("this model has no KV cache that is known")
    texts = [calibration_file(index.path, args.calibration), calibration_file(index.path, args.text, "eval")]
    if None in texts:
        parser.error("name --calibration and --text")
    ctx = MeasureContext(
        index, expand_formats("int4-g64"), text=texts[0], tokens=args.measure_tokens, seq_len=args.seq_len, seed=args.seed
    )  # fmt: skip
    layout, tables = KvLayout(), dict[str, tuple[KvTable, int]]()
    for metric in args.metrics:
        with tempfile.TemporaryDirectory() as parts:
            rows = run_metric(get_metric(metric), ctx, Path(parts))
        cost = get_metric(metric).cost(ctx)
        for value in VALUES[metric]:
            tables[value] = (
                KvTable.from_rows(rows, value, layout),
                int(cost.forward_tokens + 2 * cost.backward_tokens),
            )
    held_out = make_calibration(
        ctx.loaded.tokenizer, texts[1], args.tokens, args.seq_len, 0, vocab_size=index.vocab_size
    )
    original = dict.fromkeys(index.unit_keys(), "bf16")
    for name in UNIFORM:
        plan = dict.fromkeys(index.kv.layers, parse_pair(name))
        limit = index.kv.plan_bytes(plan, args.context, 1, layout)
        made: dict[str, tuple[dict[int, Any], float | None, int]] = {f"uniform {name}": (plan, None, 0)}
        for value, (table, paid) in tables.items():
            problem = kv_problem(table, index.kv, context=args.context, batch=1, limit_bytes=limit)
            for solver in ("mckp", "kvtuner"):
                solution = get_solver(solver).solve(problem, seed=args.seed)
                pairs = {
                    layer: parse_pair(problem.formats[j])
                    for layer, j in zip(index.kv.layers, solution.choice.tolist())
                }
                made[f"{value} + {solver}"] = pairs, problem.objective(solution.choice), paid
        found = verify_many(ctx.loaded, index, dict.fromkeys(made, original), held_out.tokens,
                            kv={k: (pairs, layout) for k, (pairs, *_) in made.items()})  # fmt: skip
        for label, (pairs, predicted, paid) in made.items():
            record = {
                "model": index.name, "plan": label, "budget": name, "limit_bytes": limit,
                "kv_bytes": index.kv.plan_bytes(pairs, args.context, 1, layout), "predicted": predicted, "kl": found[label].kl_mean,
                "kl_stderr": found[label].kl_stderr, "flips": found[label].top1_flips, "tokens": paid, "measure_tokens": args.measure_tokens,
                "held_out_tokens": int(held_out.tokens.size), "seq_len": args.seq_len, "context": args.context, "seed": args.seed,
                "cores": os.cpu_count(), "device": platform.machine(), "torch": torch.__version__, "python": platform.python_version(),
            }  # fmt: skip
            print(f"{name}: {label}: KL {record['kl']:.4f} +- {record['kl_stderr']:.4f}, {record['kv_bytes']:,} of {limit:,} bytes", flush=True)  # fmt: skip
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            with Path(args.out).open("a") as out:
                out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
