"""What prefix reuse saves on single flips: a flip in block l costs the blocks from l on, against a whole forward pass.

    python benchmarks/prefix_reuse.py models/smollm2 --vocab 0,4096

Both ways run in turn in one process on the same flips, units drawn evenly over the model; what is timed is the model's run and the KL
against the kept original. ``--vocab N`` cuts the vocabulary to its first N tokens (0 = as it is): a small model spends a fifth of its
work in the head, which every flip has to compute, a model of 7 billion weights a thirtieth. ``bound`` is the ratio of multiplications, which no
reuse can beat. Appends one JSON line per vocabulary to benchmarks/results/prefix_reuse.jsonl.
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
from torch import nn

from bitatlas.analysis.divergence import KlReference
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.prefix import PrefixRunner


def main() -> None:
    """Times both ways and appends the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--vocab", type=lambda s: [int(v) for v in s.split(",")], default=[0, 4096])
    parser.add_argument("--flips", type=int, default=30)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--out", default="benchmarks/results/prefix_reuse.jsonl")
    args = parser.parse_args()
    index = index_model(args.model)
    units = [u for u in index.units if u.layer >= 0]
    picked = [units[i] for i in np.linspace(0, len(units) - 1, args.flips).round().astype(int)]
    per_layer = sum(u.params for u in units) / index.n_layers
    for vocab in args.vocab:
        loaded = LoadedModel.open(index)
        if vocab:
            cut_vocabulary(loaded.model, vocab)
        size = int(loaded.model.get_output_embeddings().weight.shape[0])
        ids = torch.randint(
            0, size, (args.sequences, args.seq_len), generator=torch.Generator().manual_seed(0)
        )
        runner = PrefixRunner(loaded, index.n_layers)
        recording = runner.record(ids)
        reference = KlReference(recording.logits)
        head = float(loaded.model.get_output_embeddings().weight.numel())
        whole = per_layer * index.n_layers + head
        bound = whole * len(picked) / sum(per_layer * (index.n_layers - u.layer) + head for u in picked)
        seconds = np.zeros((len(picked), 2))
        with torch.no_grad():
            for i, unit in enumerate(picked):
                weight = loaded.handle(unit.key).get()
                with loaded.swapped({unit.key: (weight * 64).round() / 64}):
                    for way in (0, 1) if i % 2 else (1, 0):
                        start = time.process_time()
                        found = reference.kl(runner.resume(recording, unit.layer if way else 0))
                        seconds[i, way] = time.process_time() - start
                        assert bool(torch.isfinite(found).all())
        ratio = seconds[:, 0].sum() / seconds[:, 1].sum()
        rng = np.random.default_rng(0)
        draws = rng.integers(0, len(picked), (2000, len(picked)))
        spread = np.quantile(seconds[draws, 0].sum(1) / seconds[draws, 1].sum(1), [0.2, 0.5, 0.8])
        record = {
            "model": index.name, "vocab": size, "flips": len(picked), "tokens": ids.numel(), "ratio": round(float(ratio), 3),
            "p20": round(float(spread[0]), 3), "p50": round(float(spread[1]), 3), "p80": round(float(spread[2]), 3), "bound": round(bound, 3),
            "head_share": round(head / whole, 4), "cpu_s_whole": round(float(np.median(seconds[:, 0])), 4), "exact": bool(runner.exact),
            "device": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with Path(args.out).open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(json.dumps(record))


def cut_vocabulary(model: nn.Module, vocab: int) -> None:
    """The first ``vocab`` tokens of a model whose embedding is tied or not; blocks untouched."""
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        module.weight = nn.Parameter(module.weight.detach()[:vocab].clone(), requires_grad=False)
    model.config.vocab_size = vocab
    model.vocab_size = vocab
    model.tie_weights()


if __name__ == "__main__":
    main()
