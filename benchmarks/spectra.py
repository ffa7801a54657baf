"""Spectra and tail fits against weightwatcher, FARMS against a loop of svdvals: CPU seconds of one core, same results.

    pip install weightwatcher            # in an environment of its own that also sees bitatlas
    python benchmarks/spectra.py --model models/smollm2

weightwatcher's time is that of ``analyze()`` with its defaults over a model of a few linear layers (its own SVD and fit);
ours is everything that `spectral` and `alphaq` read off the whole matrix. They alternate, and the smallest time of each
counts, so that other load hits both alike. Without --model only random heavy-tailed matrices with the shapes of 30B-A3B's
experts are taken. Appends one JSON line per shape to benchmarks/results/spectra.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.power_law import THRESHOLD, PowerLaw
from bitatlas.analysis.spectra import (
    FARMS_TILE,
    farms_pick,
    farms_tiles,
    hill_alpha,
    slab_spectrum,
    spectral_entropy,
    stable_rank,
    tiles_hill,
)
from bitatlas.analysis.weights import WeightReader
from bitatlas.kernels import eigen


def heavy(rows: int, cols: int, seed: int) -> Tensor:
    """Noise and a quarter of power-law directions, rounded to bfloat16 as a checkpoint is."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, cols) // 4
    strength = torch.rand(rank, generator=generator).pow(-0.4) * 0.1
    w = torch.randn(rows, cols, generator=generator)
    w += (torch.randn(rows, rank, generator=generator) * strength) @ torch.randn(
        rank, cols, generator=generator
    )
    return (w * 0.02).to(torch.bfloat16).to(torch.float32)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call in this process, and what it gave."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def ours(w: Tensor) -> PowerLaw:
    """All numbers of one matrix; returns the fit."""
    tall = w if w.shape[0] >= w.shape[1] else w.mT
    values, fit = slab_spectrum(lambda: [tall], min(w.shape), w.shape[0] == w.shape[1])
    spectrum = torch.from_numpy(values)
    known = values[values > THRESHOLD]
    _ = hill_alpha(spectrum), stable_rank(spectrum), spectral_entropy(spectrum), np.log(known).mean()
    return fit


def compare(name: str, weights: list[Tensor], rounds: int) -> dict[str, Any]:
    """weightwatcher and ours over the same matrices."""
    import weightwatcher

    layers = []
    for w in weights:
        layers.append(nn.Linear(w.shape[1], w.shape[0], bias=False))
        layers[-1].weight.data = w
    watcher = weightwatcher.WeightWatcher(model=nn.Sequential(*layers))
    theirs_s, ours_s = [], []
    for _ in range(rounds):
        seconds, table = cpu_seconds(lambda: watcher.analyze())
        theirs_s.append(seconds / len(weights))
        seconds, fits = cpu_seconds(lambda: [ours(w) for w in weights])
        ours_s.append(seconds / len(weights))
    table = table.sort_values("layer_id")
    assert len(table) == len(fits)
    same = [int(n) == f.tail for n, f in zip(table["num_pl_spikes"], fits)]
    return {
        "name": name, "shape": list(weights[0].shape), "matrices": len(weights),
        "weightwatcher_ms": min(theirs_s) * 1e3, "ours_ms": min(ours_s) * 1e3, "ratio": min(theirs_s) / min(ours_s),
        "largest_alpha_difference": max(abs(a - f.alpha) for a, f in zip(table["alpha"], fits)),
        "same_xmin": sum(same), "peer": weightwatcher.__version__,
    }  # fmt: skip


def farms(name: str, weights: list[Tensor], rounds: int) -> dict[str, Any]:
    """AlphaQ's loop over tiles and ours, the same tiles."""

    def loop(w: Tensor, pick: Tensor) -> float:
        across, values = w.shape[1] // FARMS_TILE, []
        for i in pick.tolist():
            r, c = i // across * FARMS_TILE, i % across * FARMS_TILE
            values.append(torch.linalg.svdvals(w[r : r + FARMS_TILE, c : c + FARMS_TILE]).square())
        return hill_alpha(torch.cat(values).sort().values)

    picks = [
        farms_pick(w.shape[0], w.shape[1], torch.Generator().manual_seed(i)) for i, w in enumerate(weights)
    ]
    loop_s, ours_s = [], []
    for _ in range(rounds):
        seconds, theirs = cpu_seconds(lambda: [loop(w, p) for w, p in zip(weights, picks)])
        loop_s.append(seconds / len(weights))
        seconds, mine = cpu_seconds(
            lambda: [tiles_hill(farms_tiles([w], [p])[0]) for w, p in zip(weights, picks)]
        )
        ours_s.append(seconds / len(weights))
    return {
        "name": f"farms, {name}", "shape": list(weights[0].shape), "matrices": len(weights), "tiles": len(picks[0]),
        "loop_ms": min(loop_s) * 1e3, "ours_ms": min(ours_s) * 1e3, "ratio": min(loop_s) / min(ours_s),
        "largest_alpha_difference": max(abs(a - b) for a, b in zip(theirs, mine)),
    }  # fmt: skip


def main() -> None:
    """Runs all comparisons and writes the lines."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if any(
        os.environ.get(name) != "1" for name in one
    ):  # read when the libraries are loaded, so once more from the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="a checkpoint; its layers' matrices, shape by shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=1000, help="matrices of a shape")
    parser.add_argument("--out", default="benchmarks/results/spectra.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    experts = [heavy(768, 2048, i) for i in range(4)] + [heavy(2048, 768, i) for i in range(2)]
    common = {"cores": 1, "kernel": eigen.library() is not None, "torch": torch.__version__, "device": platform.machine(),
              "python": platform.python_version()}  # fmt: skip
    records = [
        compare("expert shapes", experts, args.rounds),
        farms("expert shapes", experts[:2], args.rounds),
    ]
    if args.model:
        index = index_model(args.model)
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        with WeightReader(index) as reader:
            for u in index.units:
                have = shapes.setdefault((u.rows, u.cols), [])
                if u.layer >= 0 and len(have) < args.most:
                    have.append(reader.get(u))
        for weights in filter(None, shapes.values()):
            records.append(compare(index.name, weights, min(args.rounds, 2)))
    with Path(args.out).open("a") as out:
        for record in records:
            out.write(json.dumps(record | common) + "\n")
            print(record)


if __name__ == "__main__":
    main()
