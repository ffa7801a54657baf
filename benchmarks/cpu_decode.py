"""Greedy decoding on the CPU: tokens per second of packed checkpoints against the bf16 and fp32 model, in one process.

python benchmarks/cpu_decode.py models/smollm2 [--tokens 32] [--threads 2] [--formats int4-g32,int8-g32]
python benchmarks/cpu_decode.py --products [--threads 1]    one row times single matrices, beside torch's own packed products

All linears and the embedding are packed in one format. Runs take turns, so that whatever else the machine does falls on
all of them; the median of the rounds counts, and only the ratios mean anything elsewhere. Appended as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, Allocation
from bitatlas.app.work.pack import pack_model
from bitatlas.kernels import cpu
from bitatlas.kernels.packed import load
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
from bitatlas.kernels.packed.modules import packed_linear
from bitatlas.kernels.reference import quantize

PRODUCTS = ("int4-g32", "int4-g32-sym", "int8-g32", "int8-channel-sym", "nf4-g64", "fp8-channel")


def decode(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds per token of greedy decoding after the prompt."""
    with torch.no_grad():
        out = model(ids, use_cache=True)
        past, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(tokens):
            out = model(last, past_key_values=past, use_cache=True)
            last = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) / tokens


# Rows and columns: attention, MLP and head of SmolLM2-135M, and two larger ones.
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 2048), (4096, 4096))


def contestants(n: int, k: int) -> dict[str, Callable[[], Any]]:
    """One bf16 row times an (n, k) matrix: ours by format, torch's int4 and int8 kernels, torch's bf16."""
    x, weight = torch.randn(1, k).bfloat16(), torch.randn(n, k)
    plain = weight.bfloat16()
    out: dict[str, Callable[[], Any]] = {"torch bf16": lambda: F.linear(x, plain)}
    for name in PRODUCTS:
        fmt = FORMATS[name]
        matrix = PackedMatrix(fmt, n, k, pack_weight(weight, fmt, quantize))
        out[f"bitatlas {name}"] = lambda m=matrix: packed_linear(x, m)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.rand(k // 32, n, 2).bfloat16()
    out["torch int4-g32"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, four, 32, grid)
    eight, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n).bfloat16()
    out["torch int8-channel"] = lambda: torch.ops.aten._weight_int8pack_mm(x, eight, scales)
    return out


def products(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds by shape and contestant, all of a shape taking turns; small matrices stay in the cache, for all of them."""
    rows = []
    for n, k in SHAPES:
        runs = contestants(n, k)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn > 1:
                    seconds[name].append(time.perf_counter() - start)
        # Short enough to run undisturbed now and then, so the fastest says more than the median on a machine in use.
        best = {name: min(s) for name, s in seconds.items()}
        rows += [
            {"product": f"{n}x{k}", "what": name, "us": statistics.median(seconds[name]) * 1e6, "fastest_us": s * 1e6,
             "fastest_over_bf16": s / best["torch bf16"], "threads": threads, "compiled": cpu.library() is not None}
            for name, s in best.items()
        ]  # fmt: skip
    return rows


def decoding(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of the model by format."""
    index = index_model(args.model)
    models: dict[str, Any] = {
        "bf16": LoadedModel.open(index, dtype=torch.bfloat16).model,
        "fp32": LoadedModel.open(index).model,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats.split(","):
            payload = sum(FORMATS[name].payload_bytes(u.rows, u.cols) for u in index.units)
            plan = Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), name), payload, index.kept_bytes,
                              payload * 8 / index.params)  # fmt: skip
            pack_model(index, plan, Path(folder) / name)
            models[f"{name} bf16"] = load(Path(folder) / name, dtype=torch.bfloat16)
            models[f"{name} fp32"] = load(Path(folder) / name, dtype=torch.float32)
        ids = torch.randint(1, index.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            decode(model, ids, 2)
        for _ in range(args.rounds):
            for name, model in models.items():
                seconds[name].append(decode(model, ids, args.tokens))
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return [
        {"model": index.name, "what": name, "tokens_per_s": 1 / s, "time_over_bf16": s / medians["bf16"],
         "threads": args.threads, "compiled": cpu.library() is not None}
        for name, s in medians.items()
    ]  # fmt: skip


def main() -> None:
    """Load, take turns, append."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--products", action="store_true", help="single products instead of a model")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default="int4-g32,int8-g32")
    parser.add_argument("--out", default="benchmarks/results/cpu_decode.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.products:
        rows = products(args.threads, 60)
    elif args.model:
        rows = decoding(args)
    else:
        parser.error("a model, or --products")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as f:
        for row in rows:
            print(json.dumps(row))
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
