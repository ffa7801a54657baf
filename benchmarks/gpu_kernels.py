"""Our Triton kernels beside cuBLAS, gemlite, torchao and torch's attention on the GPU at hand: every row of the table of
targets in one command; also measures the launch settings.

python benchmarks/gpu_kernels.py [--tune] [--only linear,experts,kv,packing] [--shapes 4096x4096] [--rows 1,16,256]
python benchmarks/gpu_kernels.py --dry    the same on the CPU in Triton's interpreter, tiny: only that it runs

How is measured stands in gpu_timing.py, what in gpu_cases.py, the targets in gpu_table.py. Bytes are those that a call has
to read or write, scales counted. Results are appended as JSON lines case by case: what was measured when the time runs out
is kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Case = dict[str, int]
KINDS = ("linear", "experts", "kv", "packing")
# (rows, columns, experts, chosen): up of Qwen3-30B-A3B and of Mixtral-8x7B.
LAYERS = ((768, 2048, 128, 8), (14336, 4096, 8, 2))
# (batch, heads, K/V heads, packed tokens): Llama-3-8B, and Qwen3-30B-A3B with half its K/V heads; 128 channels.
CACHES = ((1, 32, 8, 2048), (1, 32, 8, 32768), (8, 32, 8, 32768), (32, 32, 8, 2048), (32, 32, 8, 32768), (1, 32, 4, 32768))  # fmt: skip


def plan(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """What to measure, in the order of the table."""
    only = args.only.split(",")
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    for kind in (k for k in KINDS if k in only):
        if kind == "linear":
            yield from ((kind, {"n": n, "k": k, "m": m}) for n, k in shapes for m in args.rows)
        elif kind == "experts":
            layers, rows = (((16, 64, 4, 2),), (1, 3)) if args.dry else (LAYERS, (1, 16, 64, 256))
            yield from ((kind, {"n": n, "k": k, "m": m, "count": e, "top_k": top}) for n, k, e, top in layers for m in rows)  # fmt: skip
        elif kind == "kv":
            dim, caches = (16, ((1, 4, 2, 64),)) if args.dry else (128, CACHES)
            for batch, heads, kv_heads, tokens in caches:
                yield kind, {"batch": batch, "heads": heads, "kv_heads": kv_heads, "tokens": tokens, "dim": dim}  # fmt: skip
        else:
            yield from ((kind, {"n": n, "k": k}) for n, k in shapes)


def measured(machine: Any, kind: str, case: Case) -> list[dict[str, Any]]:
    """Rows of one case."""
    import gpu_cases
    from gpu_timing import measure

    more: dict[str, Any] = {}
    if kind == "experts":
        found, share = gpu_cases.experts(machine, **case)
        more = {"mixed": {"share": share}}
    else:
        make: dict[str, Callable[..., Any]] = {"linear": gpu_cases.linear, "kv": gpu_cases.kv_decode, "packing": gpu_cases.packing}  # fmt: skip
        found = make[kind](machine, **case)
    out = []
    for name, t in measure(machine, found).items():
        one = found[name]
        out.append({"what": kind, "case": case, "kernel": name, "us_p20": t.p20, "us_p50": t.p50, "us_p80": t.p80,
                    "samples": t.samples, "copies": one.copies, "nbytes": one.nbytes, "gb_per_s": one.nbytes / t.p50 / 1e3,
                    **more.get(name, {})})  # fmt: skip
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU in the interpreter; nothing is appended"
    )
    parser.add_argument("--tune", action="store_true", help="measure launch settings first and keep them")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--shapes", help="of weights, ROWSxCOLUMNS")
    parser.add_argument("--rows", help="of the input")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out", default="benchmarks/results/gpu_kernels.jsonl")
    args = parser.parse_args()
    args.shapes = args.shapes or ("16x64" if args.dry else "4096x4096,8192x8192")
    args.rows = [int(m) for m in (args.rows or ("1,3" if args.dry else "1,4,8,16,64,256")).split(",")]
    return args


def main() -> None:
    """Check for a GPU, tune when asked, time, append, show the table."""
    args = _arguments()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    elif not torch.cuda.is_available():
        print(
            "there is no GPU that torch can use here; the GPU tests and benchmarks need one", file=sys.stderr
        )
        raise SystemExit(2)
    if args.check:
        print(torch.cuda.get_device_name(0))
        return
    from gpu_table import fill, show
    from gpu_timing import Machine
    from gpu_tune import tune

    from bitatlas.kernels import tuned

    machine = Machine.dry() if args.dry else Machine.gpu(args.samples)
    out = Path(args.out)
    about = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "gpu": machine.name, "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        if args.tune:
            tune(machine, tuned.folder() / f"{tuned.slug(machine.name)}.json", plan(args))
        for kind, case in plan(args):
            found = [{**about, **row} for row in measured(machine, kind, case)]
            for row in found:
                print(json.dumps(row), flush=True)
            rows += found
            if not args.dry:
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a", encoding="utf-8") as f:
                    f.writelines(json.dumps(row) + "\n" for row in found)
                gc.collect()
                torch.cuda.empty_cache()
    print(show(fill(rows)))


if __name__ == "__main__":
    main()
