"""Greedy decoding on the CPU: tokens per second of packed checkpoints against the bf16 and fp32 model, in one process.

python benchmarks/cpu_decode.py models/smollm2 [--tokens 32] [--threads 2] [--formats int4-g32,int8-g32]

All linears and the embedding are packed in one format. Runs take turns, so that whatever else the machine does falls on
all of them; the median of the rounds counts, and only the ratios mean anything elsewhere. Appended as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, Allocation
from bitatlas.app.work.pack import pack_model
from bitatlas.kernels import cpu
from bitatlas.kernels.packed import load


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


def main() -> None:
    """Load, take turns, append."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default="int4-g32,int8-g32")
    parser.add_argument("--out", default="benchmarks/results/cpu_decode.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
    rows = [
        {"model": index.name, "what": name, "tokens_per_s": 1 / s, "time_over_bf16": s / medians["bf16"],
         "threads": args.threads, "compiled": cpu.library() is not None}
        for name, s in medians.items()
    ]  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as f:
        for row in rows:
            print(json.dumps(row))
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
