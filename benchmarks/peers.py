"""Allocations of other tools against ours at the same bytes, measured by the same verification.

    python benchmarks/peers.py models/smollm2 build/peers/*.json --calibration CALIBRATION.txt --text HELD_OUT.txt

The files come from `peer_allocations.py`. Only linear layers of the blocks are allocated, the embedding stays bf16, as the
peers do it. Every allocation is read as int{b}-g64 asymmetric round-to-nearest, whatever quantiser the peer would use: this
compares the choice of bits, not the quantisers. Ours is what `solve` gives (the exact solution of --metric) within the peer's bytes,
with the peer's own set of widths ("same widths") and with all of ours ("all widths"). One JSON line each is appended to
benchmarks/results/peers.jsonl; ``calibration_tokens`` is how much text each side read; a peer reads it once per
option or pass, ours once with two backward passes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

from bitatlas.analysis.calibration import make_calibration
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import SensitivityTable
from bitatlas.analysis.verify import Verifier
from bitatlas.kernels.formats import expand_formats
from bitatlas.solvers import Problem, get_solver

FORMATS = "int{2,3,4,5,6,8}-g64"


def main() -> None:
    """Measures once, solves at every peer's bytes, verifies all together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--metric", default="fisher_anchored", help="of the values that fisher_projection gives"
    )
    parser.add_argument("--parts", default="build/peers_fisher")
    parser.add_argument("--out", default="benchmarks/results/peers.jsonl")
    args = parser.parse_args()

    index = index_model(args.model)
    formats = expand_formats(FORMATS)
    ctx = MeasureContext(index, formats, text=args.calibration, tokens=96 * 128, seq_len=128, seed=args.seed)
    rows = run_metric(get_metric("fisher_projection"), ctx, Path(args.parts))
    table = SensitivityTable.from_rows([r for r in rows if r.metric == args.metric], index.unit_keys())
    damage = np.column_stack([table.select([f.name for f in formats]).damage, np.zeros(len(index.units))])
    names = [f.name for f in formats] + ["bf16"]
    size = index.bytes_table([*formats, *expand_formats("bf16")])
    keys = index.unit_keys()

    allocations: dict[str, dict[str, str]] = {}
    facts: dict[str, dict[str, object]] = {}
    for file in args.files:
        peer = json.loads(Path(file).read_text())
        owner = {k: k.removesuffix(".weight") for k in keys}
        bits = {k: peer["bits"].get(owner[k]) for k in keys}
        choice = np.array([names.index(f"int{bits[k]}-g64") if bits[k] else len(formats) for k in keys])
        label = f"{peer['peer']} {peer['target']}"
        limit = int(size[np.arange(len(keys)), choice].sum())
        allocations[label] = {k: names[j] for k, j in zip(keys, choice)}
        facts[label] = {
            "bytes": limit,
            "calibration_tokens": peer["samples"] * peer["length"],
            "version": peer["version"],
        }
        widths = sorted(set(choice[choice < len(formats)].tolist()))
        for words, columns in (("same widths", widths), ("all widths", list(range(len(formats))))):
            allowed = np.zeros(size.shape, bool)
            allowed[:, columns] = True
            allowed[choice == len(formats)] = np.arange(len(names)) == len(formats)
            problem = Problem.of(damage, size, limit, units=keys, formats=tuple(names), allowed=allowed)
            found = get_solver("mckp").solve(problem)
            ours = f"ours, {words}, for {label}"
            allocations[ours] = {k: names[j] for k, j in zip(keys, found.choice)}
            facts[ours] = {
                "bytes": found.certificate.payload_bytes,
                "calibration_tokens": 96 * 128,
                "predicted": found.certificate.objective,
            }

    held_out = make_calibration(ctx.loaded.tokenizer, args.text, args.tokens, 256, 0, avoid=[ctx.calibration])
    verifier = Verifier(ctx.loaded, index, held_out.tokens, allocations, weights_gib=5.0)
    results = verifier.results({step: verifier.run(step) for step in verifier.steps()})
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(args.out).open("a") as out:
        for name, result in results.items():
            linear = sum(index.units[i].params for i, k in enumerate(keys) if allocations[name][k] != "bf16")
            payload = sum(
                int(size[i, names.index(allocations[name][k])]) for i, k in enumerate(keys) if allocations[name][k] != "bf16"
            )  # fmt: skip
            record = {
                "name": name, **facts[name], "bits": round(payload * 8 / linear, 4), "kl": result.kl_mean, "kl_stderr": result.kl_stderr,
                "held_out_tokens": result.tokens, "seed": args.seed, "metric": args.metric, "model": index.digest[:16],
                "device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                "torch": torch.__version__, "transformers": transformers.__version__,
            }  # fmt: skip
            out.write(json.dumps(record) + "\n")
            print(
                f"{name:48s} {record['bits']:.3f} bits  KL {result.kl_mean:.4f} +- {result.kl_stderr:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
