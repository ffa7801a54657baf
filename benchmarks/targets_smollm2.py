"""Allocations solved under an engine's rules against that engine's own standard mixes, at the same or smaller bytes.

python benchmarks/targets_smollm2.py models/smollm2 --text TEXT --calibration TEXT [--tokens N] [--refine] [--path]

llama.cpp: the types that its Q3_K_M and Q4_K_M rules give every tensor after the fallbacks of llama-quantize (576 columns
are no whole blocks of 256, so most k-quants become q4_0, q5_0, q5_1, q8_0), each standing for the format with the nearest
grid; bytes are those of the GGUF. vLLM: all linears symmetric in groups of 64 at 4 and at 3 bits (128 does not divide 576),
embedding at 16 bits. Both sides use the same quantiser and the same held-out tokens. Results are appended as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from bitatlas.analysis.schema import FORMATS, Allocation, ModelIndex, QuantUnit
from bitatlas.app import tasks
from bitatlas.app.targets import get_target
from bitatlas.app.targets.ggml import fallback, tensor_bytes

# The rule of llama.cpp's llama_tensor_get_type_impl for a dense Llama: role -> type, "more" = use_more_bits of the layer.
MIXES = {
    "Q3_K_M": {"": "q3_k", "v": "q5_k", "o": "q4_k", "down": ("q4_k", "q5_k"), "embed": "q6_k"},
    "Q4_K_M": {"": "q4_k", "v": ("q4_k", "q6_k"), "down": ("q4_k", "q6_k"), "embed": "q6_k"},
}
# The nearest grid of ours: k-quants have groups of 16 or 32 and pay for their scales a little less.
STANDS_FOR = {"q4_0": "int4-g32-sym", "q4_1": "int4-g32", "q5_0": "int5-g32-sym", "q5_1": "int5-g32", "q8_0": "int8-g32-sym",
              "q3_k": "int3-g32", "q4_k": "int4-g32", "q5_k": "int5-g32", "q6_k": "int6-g32"}  # fmt: skip
LLAMA_FORMATS = "int3-g32,int{4,5,6}-g32,int{4,5,8}-g32-sym"
VLLM_FORMATS = "int{2,3,4,5,6,8}-g64-sym,int{3,4,8}-g32-sym"


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def ggml_mix(index: ModelIndex, rule: dict[str, str | tuple[str, str]]) -> tuple[dict[str, str], int]:
    """(unit -> format that stands for its type, bytes of the GGUF's quantised tensors)."""
    formats, size = {}, 0
    for u in index.units:
        kind = rule.get(u.role, rule[""])
        if isinstance(kind, tuple):
            kind = kind[more_bits(u.layer, index.n_layers)]
        got = fallback(kind, u.cols)
        formats[u.key] = STANDS_FOR[got]
        size += tensor_bytes(got, u.params)
    return formats, size


def allocation(index: ModelIndex, formats: dict[str, str], name: str) -> Allocation:
    """An allocation of a standard mix."""
    payload = sum(FORMATS[formats[u.key]].payload_bytes(u.rows, u.cols) for u in index.units)
    return Allocation(
        index.digest, index.name, formats, payload, index.kept_bytes, payload * 8 / index.params, solver=name
    )


def uniform(u: QuantUnit, name: str) -> str:
    """vLLM's standard: every linear alike, the embedding as it is."""
    return "bf16" if u.role in ("embed", "head") else name


def main() -> None:
    """Measure, solve, verify, append."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=12288)
    parser.add_argument("--targets", default="llama.cpp,vllm")
    parser.add_argument("--refine", action="store_true", help="improve each allocation on the real model")
    parser.add_argument("--path", action="store_true", help="path descent under the same rules, in bfloat16")
    parser.add_argument("--bits", type=lambda s: [float(b) for b in s.split(",")], default=[3.5, 4.5])
    parser.add_argument("--out", default="benchmarks/results/targets_smollm2.jsonl")
    args = parser.parse_args()
    index = tasks.register(args.model)
    out = Path(args.out)
    for target in args.targets.split(","):
        formats = LLAMA_FORMATS if target == "llama.cpp" else VLLM_FORMATS
        tasks.measure(args.model, "fisher", formats=formats, calibration=args.calibration,
                      tokens=args.calibration_tokens, wait=True)  # fmt: skip
        engine = get_target(target)
        for nominal in args.bits:
            if target == "llama.cpp":
                name = "Q3_K_M" if nominal < 4 else "Q4_K_M"
                mix, size = ggml_mix(index, MIXES[name])
            else:
                name = f"int{round(nominal - 0.5)}-g64-sym"
                mix = {u.key: uniform(u, name) for u in index.units}
                size = sum(engine.unit_bytes(u, FORMATS[mix[u.key]]) for u in index.units)
            standard = allocation(index, mix, name)
            plan = tasks.solve(
                args.model, bytes_=size + engine.kept_bytes(index), formats=formats, target=target
            )
            plans = [standard, plan]
            if args.refine:
                plans.append(tasks.refine(args.model, plan, calibration=args.calibration))
            if args.path:
                best = tasks.search(
                    args.model, solver="path", metric="fisher", bytes_=size + engine.kept_bytes(index), formats=formats,
                    target=target, calibration=args.calibration, precision="bfloat16",
                )  # fmt: skip
                assert isinstance(best, Allocation)
                plans.append(best)
            results = tasks.verify(args.model, plans, text=args.text, tokens=args.tokens)["results"]
            for p, result in zip(plans, results, strict=True):
                verdict = engine.check(replace(p, model_digest=index.digest), index)
                nbytes = size if p is standard else verdict.bytes - engine.kept_bytes(index)
                row = {
                    "target": target, "nominal_bits": nominal, "standard": name, "solver": p.solver, "verdict": verdict.status,
                    "engine_bytes": nbytes, "engine_bits": nbytes * 8 / index.params, "kl": result["kl_mean"],
                    "kl_stderr": result["kl_stderr"], "flips": result["flips"], "tokens": result["tokens"],
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
                    f.flush()
                    os.fsync(f.fileno())


if __name__ == "__main__":
    main()
