"""Which metric can be trusted: every metric of a model against measured KL of single flips and random whole allocations.

    python benchmarks/agreement.py models/smollm2 --calibration CALIBRATION.txt --text HELD_OUT.txt

Everything is a job in the data folder ($BITATLAS_HOME): after an interruption the same call goes on where it was, and what
is finished is not measured again. First the truth on the held-out text (cheap: the original's distributions are kept, a flip
costs only the blocks from its own on), then each metric on the calibration text, then one line per metric is appended to
benchmarks/results/agreement.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.analysis.metrics import METRICS
from bitatlas.analysis.schema import UserError, null_nan
from bitatlas.app import tasks


def told(status: Any) -> None:
    """Progress on stderr."""
    sys.stderr.write(f"\r\x1b[2K{status.title[:60]}: {status.done}/{status.total} {status.phase}")
    sys.stderr.flush()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", help="text to measure the metrics on; the demo brings its own")
    parser.add_argument("--text", help="held-out text for the truth; the demo brings its own")
    parser.add_argument("--metrics", default="all", help="comma list; all = every one but kl_flip")
    parser.add_argument("--formats", default="int{2,3,4,5,6,8}-g64", help="of metrics and whole allocations")
    parser.add_argument("--flip-formats", default="int{2,3,4}-g64")
    parser.add_argument("--flips", type=int, default=240, help="single flips, 0 = all")
    parser.add_argument("--allocations", type=int, default=64)
    parser.add_argument("--low", type=float, default=2.5, help="effective bits of the smallest allocation")
    parser.add_argument("--high", type=float, default=5.0)
    parser.add_argument("--truth-tokens", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=96 * 128, help="calibration tokens of the metrics")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE, an option of a metric")
    parser.add_argument("--out", default="benchmarks/results/agreement.jsonl")
    return parser.parse_args()


def main() -> None:
    """Measures what is missing and appends the table."""
    args = arguments()
    start = time.perf_counter()
    tasks.truth(
        args.model, text=args.text, flips=args.flips, flip_formats=args.flip_formats, allocations=args.allocations, formats=args.formats,
        low=args.low, high=args.high, tokens=args.truth_tokens, seq_len=args.seq_len, seed=args.seed, on_progress=told,
    )  # fmt: skip
    truth_s, settings = time.perf_counter() - start, tasks.parse_settings(args.set)
    names = [m for m in METRICS if m != "kl_flip"] if args.metrics == "all" else args.metrics.split(",")
    for name in names:
        own = {k: v for k, v in settings.items() if k in METRICS[name].SETTINGS}
        try:
            tasks.measure(
                args.model, name, formats=args.formats, calibration=args.calibration, tokens=args.tokens,
                seq_len=args.seq_len, seed=args.seed, settings=own, wait=True, on_progress=told,
            )  # fmt: skip
        except UserError as error:  # routing of a dense model, say
            print(f"\n{name}: {error}")
    table = tasks.agree(args.model)
    common = {
        "model": table["model"], "truth_tokens": args.truth_tokens, "flips_asked": args.flips, "allocations_asked": args.allocations,
        "flip_formats": args.flip_formats, "formats": args.formats, "range_bits": [args.low, args.high], "seed": args.seed,
        "truth_s": round(truth_s, 1), "all_s": round(time.perf_counter() - start, 1), "cores": os.cpu_count(),
        "device": platform.machine(), "python": platform.python_version(),
    }  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(args.out).open("a") as out:
        for row in table["rows"]:
            out.write(json.dumps(null_nan({**common, **row})) + "\n")
    print(
        f"\n{'metric':24s} {'badge':18s} {'flips':>6s} {'within':>7s} {'whole':>6s} {'worst band':>10s} {'ratio':>6s}"
    )
    for r in table["rows"]:
        cells = (r[k] for k in ("flip_spearman", "flip_within", "spearman", "band_least", "ratio"))
        print(
            f"{r['metric']:24s} {r['badge']:18s} "
            + " ".join(f"{x:7.3f}" if np.isfinite(x) else "      -" for x in cells)
        )


if __name__ == "__main__":
    main()
