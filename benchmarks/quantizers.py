"""Measured KL of every quantiser at uniform int3-g64 and int4-g64, on one model.

    python benchmarks/quantizers.py models/smollm2 --calibration CALIBRATION.txt --text HELD_OUT.txt
    python benchmarks/quantizers.py demo

Embedding and head stay at int8-g64 round to nearest for every quantiser, so that the differences are those of the layers.
All quantisers see the same calibration statistics. Appends one JSON line per quantiser and format to
benchmarks/results/quantizers.jsonl. CPU seconds are those of quantising alone, statistics not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from bitatlas.analysis.calibration import make_calibration
from bitatlas.analysis.divergence import token_kl, top1_changed
from bitatlas.analysis.input_stats import InputSource
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.quantising import UnitQuantizer
from bitatlas.analysis.schema import parse_format
from bitatlas.app import tasks
from bitatlas.app.tasks.measuring import calibration_file

KEPT = "int8-g64"  # embedding and head
BATCH = 2  # sequences of a forward pass


def main() -> None:
    """Runs the table and appends its lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration")
    parser.add_argument("--text", help="held-out text")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--quantizers", default=",".join(tasks.quantizers()))
    parser.add_argument("--formats", default="int3-g64,int4-g64")
    parser.add_argument("--out", default="benchmarks/results/quantizers.jsonl")
    args = parser.parse_args()

    index = tasks.open_index(args.model)
    loaded = LoadedModel.open(index)
    texts = [calibration_file(index.path, args.calibration), calibration_file(index.path, args.text, "eval")]
    if None in texts:
        parser.error("name --calibration and --text")
    calibration, held_out = (
        make_calibration(loaded.tokenizer, text, n, args.seq_len, 0, vocab_size=index.vocab_size)
        for text, n in zip(texts, (args.calibration_tokens, args.tokens), strict=True)
    )
    batches = [
        torch.from_numpy(held_out.tokens[i : i + BATCH]) for i in range(0, len(held_out.tokens), BATCH)
    ]
    source = InputSource(loaded, calibration.tokens, index.units, limit_bytes=1 << 30)
    with torch.no_grad():
        original = [loaded.logits(ids) for ids in batches]
        for name in args.formats.split(","):
            rounded = {u.key: KEPT if u.role in ("embed", "head") else name for u in index.units}
            bits = (
                sum(parse_format(rounded[u.key]).payload_bytes(u.rows, u.cols) for u in index.units)
                * 8
                / index.params
            )
            for quantizer in args.quantizers.split(","):
                start = time.process_time()
                made = UnitQuantizer.over(quantizer, loaded, calibration.tokens, rounded, source=source)
                kept = UnitQuantizer("rtn")
                weights = {
                    u.key: (kept if rounded[u.key] == KEPT else made).effective(
                        u.key, loaded.handle(u.key).get(), parse_format(rounded[u.key])
                    )
                    for u in index.units
                }
                seconds = time.process_time() - start
                with loaded.swapped(weights):
                    pairs = [(a, loaded.logits(ids)) for a, ids in zip(original, batches, strict=True)]
                    kl = np.concatenate([token_kl(a, b).numpy() for a, b in pairs])  # (S, T)
                    flips = float(np.concatenate([top1_changed(a, b).numpy() for a, b in pairs]).mean())
                del weights, pairs
                record = {
                    "model": index.name, "quantizer": quantizer, "format": name, "embedding": KEPT, "bits": round(bits, 4),
                    "kl_mean": float(kl.mean()), "kl_stderr": float(kl.mean(1).std(ddof=1) / len(kl) ** 0.5),
                    "kl_p50": float(np.median(kl)), "kl_p99": float(np.quantile(kl, 0.99)), "flips": flips,
                    "tokens": int(kl.size), "calibration_tokens": calibration.size, "seq_len": args.seq_len,
                    "quantise_cpu_s": round(seconds, 1), "folds": len(made.folding.scales), "device": platform.machine(),
                    "cores": os.cpu_count(), "torch": torch.__version__, "transformers": transformers.__version__,
                }  # fmt: skip
                print(
                    {k: record[k] for k in ("quantizer", "format", "kl_mean", "kl_stderr", "quantise_cpu_s")},
                    flush=True,
                )
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                with Path(args.out).open("a") as out:
                    out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
