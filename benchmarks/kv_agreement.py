"""Metrics of the KV cache against measured KL of single layers and pairs, on the same tokens.

    python benchmarks/kv_agreement.py models/smollm2 --calibration CALIBRATION.txt --tokens 1024 --set draws=8
    python benchmarks/kv_agreement.py demo

`kv_flip` quantises the cache of one layer in one pair of formats and measures; the others predict. Ranks (Spearman), the
median of predicted over measured and its spread over all layers and pairs, and for keys of each format alone; CPU seconds of
this process where nothing was there before (parts stay under --parts). Appends one JSON line per metric to
benchmarks/results/kv_agreement.jsonl.
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

from bitatlas.analysis.agreement import spearman
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.app import tasks
from bitatlas.app.tasks.measuring import calibration_file

KEYS, VALUES = "kv2-token,kv4-token,kv2-channel,kv4-channel", "kv2-token,kv4-token"


def main() -> None:
    """Measure, compare, append."""
    args = arguments()
    index = tasks.open_index(args.model)
    text = calibration_file(index.path, args.calibration)
    settings = {"kv_keys": args.keys, "kv_values": args.values} | dict(s.split("=", 1) for s in args.set)
    found: dict[str, dict[tuple[str, str], float]] = {}
    seconds: dict[str, float | None] = {}
    for name in ("kv_flip", *args.metrics):
        metric, folder = get_metric(name), Path(args.parts) / f"{index.digest[:12]}-{name}"
        own = {k: v for k, v in settings.items() if k in metric.SETTINGS}
        ctx = MeasureContext(
            index, (), text=text, tokens=args.tokens, seq_len=args.seq_len, seed=args.seed, settings=own
        )
        fresh, start = not folder.exists(), time.process_time()
        folder.mkdir(parents=True, exist_ok=True)
        rows = run_metric(metric, ctx, folder)
        seconds[name] = round(time.process_time() - start, 1) if fresh else None
        found[name] = {(r.unit, r.format): r.value for r in rows if r.metric == name}
    for name in args.metrics:
        both = sorted(set(found["kv_flip"]) & set(found[name]))
        record = {
            "model": index.name, "metric": name, **compared(both, found[name], found["kv_flip"]),
            "by_keys": {k: compared([b for b in both if b[1].startswith(k + "/")], found[name], found["kv_flip"]) for k in args.keys.split(",")},
            "cpu_s": seconds[name], "flip_cpu_s": seconds["kv_flip"], "tokens": args.tokens, "seq_len": args.seq_len, "settings": args.set,
            "seed": args.seed, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": platform.machine(),
            "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with Path(args.out).open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(
            f"{name}: ranks {record['spearman']:.3f}, ratio {record['ratio']:.2f}, spread of its log {record['spread']:.2f}, {record['pairs']} layers and pairs"
        )


def compared(
    keys: list[tuple[str, str]],
    predicted: dict[tuple[str, str], float],
    measured: dict[tuple[str, str], float],
) -> dict[str, float]:
    """Ranks, median ratio, standard deviation of the log ratio."""
    p, t = (np.array([table[k] for k in keys]) for table in (predicted, measured))
    ratio = p / t
    return {
        "spearman": round(spearman(p, t), 4), "ratio": round(float(np.median(ratio)), 4),
        "spread": round(float(np.std(np.log(ratio))), 4), "pairs": len(keys),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", help="text; the demo brings its own")
    parser.add_argument("--metrics", type=lambda s: s.split(","), default=["kv_output", "kv_fisher"])
    parser.add_argument("--keys", default=KEYS, help="formats of K")
    parser.add_argument("--values", default=VALUES, help="formats of V")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE, an option of the metrics")
    parser.add_argument("--parts", default="build/kv_agreement", help="folder of the metrics' part files")
    parser.add_argument("--out", default="benchmarks/results/kv_agreement.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
