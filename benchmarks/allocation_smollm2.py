"""Mixed precision against uniform formats and hand-made mixes on SmolLM2-135M, measured on held-out text.

    python benchmarks/allocation_smollm2.py models/smollm2 --calibration CALIBRATION.txt --text HELD_OUT.txt

Measures the Fisher projection (96 sequences x 128 tokens x 2 draws), solves at three sizes with each of the metric's
values, verifies everything on the held-out text, and appends one JSON line per allocation to
benchmarks/results/allocation_smollm2.jsonl. ``gain`` is how far the measured KL lies below the log-linear
interpolation between the two uniform formats around that size. The held-out text chooses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bitatlas.analysis.calibration import check_disjoint, make_calibration
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import SensitivityTable
from bitatlas.analysis.verify import Verifier
from bitatlas.kernels.formats import expand_formats
from bitatlas.solvers import Problem, get_solver

FORMATS = "int{2,3,4,5,6,8}-g64"
BUDGETS = (3.5, 3.9, 4.3)
UNIFORM = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64")
MIXES = ("first_last", "attention_high", "q4_k_m")
VALUES = ("fisher", "fisher_projection", "fisher_trace")


def interpolated(bits: float, uniform: list[tuple[float, float]]) -> float:
    """KL at ``bits`` on the straight line of ln KL against bits between the neighbouring uniform formats."""
    x, y = zip(*sorted(uniform))
    return float(np.exp(np.interp(bits, x, np.log(y))))


def main() -> None:
    """Runs the whole comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to measure on")
    parser.add_argument("--text", required=True, help="held-out text to verify on")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parts", default="build/allocation_smollm2", help="folder of the measurement's part files"
    )
    parser.add_argument("--out", default="benchmarks/results/allocation_smollm2.jsonl")
    args = parser.parse_args()

    index = index_model(args.model)
    formats = expand_formats(FORMATS)
    ctx = MeasureContext(index, formats, text=args.calibration, tokens=96 * 128, seq_len=128, seed=args.seed)
    start = time.perf_counter()
    run = f"{index.digest[:12]}-{ctx.calibration.digest[:12]}-{args.seed}"
    rows = run_metric(
        get_metric("fisher_projection"), ctx, Path(args.parts) / run,
        on_step=lambda s: print(f"measure {s.done}/{s.total} {s.seconds:.1f} s", end="\r", flush=True),
    )  # fmt: skip
    measure_s = time.perf_counter() - start
    held_out = make_calibration(ctx.loaded.tokenizer, args.text, args.tokens, 256, 0, avoid=[ctx.calibration])
    check_disjoint(ctx.calibration, held_out)

    allocations: dict[str, dict[str, str]] = {u: dict.fromkeys(index.unit_keys(), u) for u in UNIFORM}
    predicted: dict[str, float] = {}
    for bits in BUDGETS:
        limit = int(bits * index.params / 8)
        for value in VALUES:
            table = SensitivityTable.from_rows([r for r in rows if r.metric == value], index.unit_keys())
            problem = Problem.build(index, table, formats, limit)
            solution = get_solver("mckp").solve(problem)
            name = f"{value} {bits}"
            allocations[name] = {k: formats[j].name for k, j in zip(index.unit_keys(), solution.choice)}
            predicted[name] = solution.certificate.objective
        for mix in MIXES:
            solution = get_solver(mix).solve(Problem.build(index, None, formats, limit))
            allocations[f"{mix} {bits}"] = {
                k: formats[j].name for k, j in zip(index.unit_keys(), solution.choice)
            }

    start = time.perf_counter()
    verifier = Verifier(ctx.loaded, index, held_out.tokens, allocations, weights_gib=5.0)
    parts = {}
    for step in verifier.steps():
        parts[step] = verifier.run(step)
        print(f"verify {step}, {time.perf_counter() - start:.0f} s", flush=True)
    results = verifier.results(parts)
    verify_s = time.perf_counter() - start
    sizes = {name: effective_bits(index, choice) for name, choice in allocations.items()}
    uniform = [(sizes[u], results[u].kl_mean) for u in UNIFORM]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(args.out).open("a") as out:
        for name, result in results.items():
            line = interpolated(sizes[name], uniform)
            best_other = min(
                (
                    r.kl_mean
                    for other, r in results.items()
                    if other not in predicted and sizes[other] <= sizes[name]
                ),
                default=float("nan"),
            )
            record: dict[str, Any] = {
                "name": name, "bits": round(sizes[name], 4), "kl": result.kl_mean, "kl_stderr": result.kl_stderr,
                "kl_p99": result.kl_p99, "top1_flips": result.top1_flips, "ppl_before": result.ppl_before,
                "ppl_after": result.ppl_after, "noise_floor": result.noise_floor, "tokens": result.tokens,
                "predicted": predicted.get(name), "interpolated": line, "gain": 1 - result.kl_mean / line,
                "best_uniform_or_mix_not_larger": best_other, "measure_s": round(measure_s, 1),
                "verify_s": round(verify_s, 1), "seed": args.seed, "calibration": ctx.calibration.digest[:16],
                "held_out": held_out.digest[:16], "model": index.digest[:16], "device": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
                "transformers": transformers.__version__, "python": platform.python_version(),
            }  # fmt: skip
            out.write(json.dumps(record) + "\n")
            print(
                f"{name:24s} {sizes[name]:.3f} bits  KL {result.kl_mean:.4f} +- {result.kl_stderr:.4f}"
                f"  predicted {predicted.get(name, float('nan')):.4f}  gain {record['gain']:+.1%}"
                f"  best uniform or mix {best_other:.4f}"
            )


def effective_bits(index: Any, choice: dict[str, str]) -> float:
    """Bits per weight of an allocation, scales and zeros counted."""
    names = tuple(dict.fromkeys(choice.values()))
    table = index.bytes_table([expand_formats(n)[0] for n in names])
    total = sum(int(table[i, names.index(choice[u.key])]) for i, u in enumerate(index.units))
    return total * 8 / index.params


if __name__ == "__main__":
    main()
