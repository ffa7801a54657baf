"""One memory for weights and KV cache, against weights alone under a fixed cache and against the cache alone.

    python benchmarks/kv_joint.py MODEL CALIBRATION EVALUATION [--tokens 16384] [--verify-tokens 16384] …

At the same total bytes: the joint solution; weights only with the cache at 16 and at 8 bits; K/V pairs only with the
weights at 16 bits. Damages are predicted by `fisher` and `kv_fisher` on the calibration text; what is compared is the KL
measured on the evaluation text, every position reading K and V as a decoding step would. A context beyond the model's
positions is taken as several sequences of the longest one. Results are appended to benchmarks/results/kv_joint.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bitatlas.analysis.calibration import make_calibration
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import (
    Allocation,
    KvLayout,
    KvTable,
    ModelIndex,
    SensitivityTable,
    UserError,
    expand_formats,
)
from bitatlas.analysis.verify import verify_many
from bitatlas.app.budgets import resolve_budget, uniform_kv
from bitatlas.app.kv_plan import pair_names
from bitatlas.app.tasks.joint import solve_joint
from bitatlas.app.tasks.solving import solve_table
from bitatlas.solvers import Problem

OUT = Path(__file__).parent / "results" / "kv_joint.jsonl"
FORMATS = "int{2,3,4,5,6,8}-g64"


def candidates(
    index: ModelIndex, table: SensitivityTable, cache: KvTable, memory: int, context: int, batch: int
) -> dict[str, Allocation]:
    """Contender -> allocation within ``memory`` bytes; contenders that do not fit are missing."""
    out: dict[str, Allocation] = {}
    names = table.formats
    free = Problem.build(index, table, names, 0)
    pinned = Problem.build(index, table, names, 0, pins=dict.fromkeys(index.unit_keys(), "bf16"))
    shape = {"total_bytes": memory, "reserve_bytes": 0, "context": context, "batch": batch}
    for name, problem in (("joint", free), ("kv only", pinned)):
        try:
            out[name] = solve_joint(index, problem, cache, **shape)
        except UserError:
            continue
    for bits in (16, 8):
        try:
            budget = resolve_budget(
                index, fit=memory, context=context, batch=batch, reserve=1, bits_k=bits, bits_v=bits
            )
            plan = pair_names(uniform_kv(index, bits, bits))
            out[f"weights only, kv{bits}"] = replace(
                solve_table(index, table, names, budget, "mckp", {}), kv=plan
            )
        except UserError:
            continue
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--verify-tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=512, help="of the calibration sequences")
    parser.add_argument(
        "--verify-seq-len", type=int, default=2048, help="of the measured sequences (at most the context)"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.25, 0.45], help="of weights and cache at 16 bits"
    )
    args = parser.parse_args()
    index, start = index_model(args.model), time.process_time()
    assert index.kv is not None
    longest = int(
        json.loads((Path(index.path) / "config.json").read_text()).get("max_position_embeddings", 1 << 30)
    )
    ctx = MeasureContext(
        index, expand_formats(FORMATS), text=args.calibration, tokens=args.tokens, seq_len=args.seq_len
    )
    with tempfile.TemporaryDirectory() as parts:
        rows = run_metric(get_metric("fisher"), ctx, Path(parts) / "w")
        table = SensitivityTable.from_rows([r for r in rows if r.metric == "fisher"], index.unit_keys())
        kv_rows = run_metric(get_metric("kv_fisher"), ctx, Path(parts) / "kv")
    cache = KvTable.from_rows(kv_rows, "kv_fisher", KvLayout())
    measured = time.process_time() - start
    print(f"measured in {measured:.0f} s of CPU", flush=True)
    loaded = ctx.loaded
    text = make_calibration(
        loaded.tokenizer,
        args.evaluation,
        args.verify_tokens,
        min(args.verify_seq_len, *args.contexts, longest),
        0,
        vocab_size=index.vocab_size,
    )
    for context in args.contexts:
        batch, tokens = -(-context // longest), min(context, longest)
        whole = 2 * index.params + index.kept_bytes + index.kv.plan_bytes({}, tokens, batch, cache.layout)
        for size in args.sizes:
            plans = candidates(index, table, cache, int(size * whole), tokens, batch)
            found = verify_many(loaded, index, {n: a.formats for n, a in plans.items()}, text.tokens,
                                kv={n: (a.kv_plan, a.kv_layout) for n, a in plans.items()})  # fmt: skip
            for name in ("joint", "weights only, kv16", "weights only, kv8", "kv only"):
                row = {
                    "model": index.name, "context": context, "sequences": batch, "tokens_each": tokens, "memory": int(size * whole),
                    "share_of_16_bits": size, "contender": name, "fits": name in plans, "calibration_tokens": args.tokens,
                    "verify_tokens": int(text.tokens.size), "verify_seq_len": int(text.tokens.shape[1]), "seq_len": args.seq_len, "measure_cpu_s": round(measured, 1),
                }  # fmt: skip
                if name in plans:
                    plan, result = plans[name], found[name]
                    kv = index.kv.plan_bytes(plan.kv_plan, tokens, batch, plan.kv_layout)
                    row |= {
                        "kl": result.kl_mean, "kl_stderr": result.kl_stderr, "flips": result.top1_flips, "predicted": plan.predicted,
                        "weights_bytes": plan.weights_bytes, "kv_bytes": kv, "bits_per_weight": plan.bits_per_weight,
                    }  # fmt: skip
                print(row, flush=True)
                OUT.parent.mkdir(exist_ok=True)
                with OUT.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
