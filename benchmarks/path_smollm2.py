"""The whole path on SmolLM2-135M by the commands that people use: measure, solve, refine, verify, pack, generate.

    make smollm2
    python benchmarks/path_smollm2.py models/smollm2 --calibration CALIBRATION.txt --text HELD_OUT.txt

Everything is a job in the data folder ($BITATLAS_HOME), so a second call joins what the first one finished. Appends one
JSON line per allocation to benchmarks/results/path_smollm2.jsonl. ``gain`` is how far the measured KL lies below the
log-linear line between the neighbouring uniform formats; the held-out text chooses nothing.
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

from bitatlas.app import tasks

FORMATS = "int{2,3,4,5,6,8}-g64"
BUDGETS = (3.5, 3.9, 4.3)
UNIFORM = ("int3-g64", "int4-g64", "int5-g64")


def main() -> None:
    """Runs the path and writes the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument(
        "--refine", type=float, nargs="*", default=list(BUDGETS), help="budgets to refine as well"
    )
    parser.add_argument("--out", default="benchmarks/results/path_smollm2.jsonl")
    parser.add_argument("--packed", type=Path, default=Path("build/path_smollm2/packed"))
    args = parser.parse_args()

    start = time.perf_counter()
    tasks.measure(
        args.model,
        "fisher",
        formats=FORMATS,
        calibration=args.calibration,
        tokens=96 * 128,
        seq_len=128,
        settings={},
        wait=True,
    )
    measure_s = time.perf_counter() - start
    plans = {
        f"uniform {name}": tasks.solve(args.model, metric="fisher", solver="uniform", formats=name, bits=16)
        for name in UNIFORM
    }
    for bits in BUDGETS:
        plans[f"solved {bits}"] = tasks.solve(
            args.model, metric="fisher", solver="mckp", bits=bits, formats=FORMATS
        )
    start = time.perf_counter()
    for bits in args.refine:
        plans[f"refined {bits}"] = tasks.refine(
            args.model, plans[f"solved {bits}"], calibration=args.calibration
        )
    refine_s = time.perf_counter() - start
    start = time.perf_counter()
    results = tasks.verify(args.model, list(plans.values()), text=args.text, tokens=args.tokens)["results"]
    verify_s = time.perf_counter() - start
    line = sorted(
        (plan.bits_per_weight, r["kl_mean"])
        for (name, plan), r in zip(plans.items(), results)
        if name.startswith("uniform")
    )
    common = {
        "measure_s": round(measure_s, 1), "refine_s": round(refine_s, 1), "verify_s": round(verify_s, 1), "device": platform.machine(),
        "cores": os.cpu_count(), "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip
    records = []
    for (name, plan), r in zip(plans.items(), results):
        expected = float(
            np.exp(np.interp(plan.bits_per_weight, [b for b, _ in line], [np.log(k) for _, k in line]))
        )
        wanted = (
            "kl_mean",
            "kl_stderr",
            "kl_p50",
            "kl_p99",
            "flips",
            "ppl_before",
            "ppl_after",
            "floor",
            "tokens",
        )
        records.append({"name": name, "bits": round(plan.bits_per_weight, 4), **{k: r[k] for k in wanted}, "predicted": plan.predicted,
                        "interpolated": expected, "gain": 1 - r["kl_mean"] / expected, **common})  # fmt: skip
    best = plans[f"refined {args.refine[0]}" if args.refine else f"solved {BUDGETS[0]}"]
    packed: dict[str, Any] = tasks.pack(args.model, best, args.packed)
    said = tasks.generate(args.packed, "The capital of France is", max_new_tokens=12)
    records.append({"name": "packed", "bits": round(best.bits_per_weight, 4), "bytes": packed["bytes"], "predicted_bytes": packed["predicted_bytes"],
                    "says": said["text"], **common})  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(args.out).open("a") as out:
        for record in records:
            out.write(json.dumps(record) + "\n")
            print(
                {k: v for k, v in record.items() if k in ("name", "bits", "kl_mean", "gain", "bytes", "says")}
            )


if __name__ == "__main__":
    main()
