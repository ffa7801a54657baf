"""How well the quadratic form itself ranks whole allocations: what no probe, pair or shrinkage of a second-order metric can beat.

    python benchmarks/second_order.py models/smollm2 --text HELD_OUT.txt

The weights move only ``--share`` of the way to an allocation; KL there, divided by the share squared, is the second-order form with
every pair of units and without sampling error, for one forward pass in float32. Allocations are those of `bitatlas truth`. One
line per allocation is appended to benchmarks/results/second_order.jsonl; lines that are there are not measured again. In the end the
ranks against the measured KL are printed, by half-bit band.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitatlas.analysis.agreement import spearman
from bitatlas.analysis.calibration import make_calibration
from bitatlas.analysis.divergence import KlReference
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import expand_formats
from bitatlas.app.work.random_allocations import random_allocations
from bitatlas.kernels.reference import quantize_dequantize


@torch.no_grad()
def main() -> None:
    """Measure what is missing, then rank."""
    args = arguments()
    index, formats = index_model(args.model), expand_formats(args.formats)
    names, keys = [f.name for f in formats], index.unit_keys()
    choices = random_allocations(index, names, args.allocations, args.low, args.high, args.seed)
    size = index.bytes_table(formats)
    loaded = LoadedModel.open(index)
    text = make_calibration(loaded.tokenizer, args.text, args.tokens, args.seq_len, args.seed)
    about: dict[str, Any] = {
        "model": index.digest[:16], "text": text.digest[:16], "tokens": args.tokens, "formats": args.formats, "allocations": args.allocations,
        "range_bits": [args.low, args.high], "seed": args.seed, "share": args.share,
    }  # fmt: skip
    out = Path(args.out)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {r["allocation"]: r for r in lines if all(r[k] == v for k, v in about.items())}
    batches = [torch.from_numpy(b) for b in np.array_split(text.tokens, max(1, len(text.tokens) // 4))]
    references = [KlReference(loaded.logits(b)) for b in batches]
    for i in [i for i in range(*slice(args.first, args.last).indices(len(choices))) if i not in known]:
        original = {k: loaded.handle(k).get() for k in keys}
        coarse = {k: quantize_dequantize(original[k], formats[int(f)]) for k, f in zip(keys, choices[i])}
        measured = []
        for share in (1.0, args.share):
            with loaded.swapped({k: torch.lerp(original[k], coarse[k], share) for k in keys}):
                kl = [r.kl(loaded.logits(b)).mean(1).numpy() for r, b in zip(references, batches)]
            measured.append(float(np.concatenate(kl).mean()))
        row = about | {
            "allocation": i, "bits": float(size[np.arange(len(keys)), choices[i]].sum() * 8 / index.params), "kl": measured[0],
            "second_order": measured[1] / args.share**2, "cores": os.cpu_count(), "device": platform.machine(), "torch": torch.__version__,
        }  # fmt: skip
        known[i] = row
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{i}: {row['bits']:.2f} bits, KL {row['kl']:.4f}, second order {row['second_order']:.4f}", flush=True)  # fmt: skip
    rank(list(known.values()))


def rank(rows: list[dict[str, Any]]) -> None:
    """Spearman of the form with the measured KL, over all and by half-bit band."""
    bits, kl, form = (np.array([r[k] for r in rows]) for k in ("bits", "kl", "second_order"))
    print(f"all {len(rows)}: {spearman(form, kl):.3f}")
    for low in np.arange(2.0, 8.0, 0.5):
        inside = (bits >= low) & (bits < low + 0.5)
        if inside.sum() > 2:
            print(f"{low:g} to {low + 0.5:g} bits, {inside.sum()}: {spearman(form[inside], kl[inside]):.3f}")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--formats", default="int{2,3,4,5,6,8}-g64")
    parser.add_argument("--allocations", type=int, default=160)
    parser.add_argument("--first", type=int, default=0, help="of the allocations, smallest first")
    parser.add_argument("--last", type=int, default=None)
    parser.add_argument("--low", type=float, default=2.5, help="effective bits of the smallest")
    parser.add_argument("--high", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.1, help="of the way to the allocation")
    parser.add_argument("--out", default="benchmarks/results/second_order.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
