"""What the Fisher projection costs beside one plain forward and backward pass, in one run.

    python benchmarks/projection_cost.py [--model models/smollm2] [--rounds 5]

Without --model, a Llama with random weights (about 30 M) is made in memory. Plain and projecting passes alternate, and
the smallest time of each counts, so that other load on the machine hits both alike. ``ratio`` = seconds per probe
(2 label draws share a forward) over the seconds of a plain forward + backward with a gradient for every weight.
Appends one JSON line to benchmarks/results/projection_cost.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bitatlas.analysis.fisher.deltas import DeltaStore
from bitatlas.analysis.fisher.probes import ProbePass
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.formats import expand_formats
from bitatlas.kernels.reference import quantize_dequantize


def random_llama(folder: Path) -> Path:
    """A checkpoint with random weights: 8 blocks, hidden 512, vocabulary 8192."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Times both and writes the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--formats", default="int{2,3,4,5,6,8}-g64")
    parser.add_argument("--out", default="benchmarks/results/projection_cost.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedModel.open(index_model(Path(args.model) if args.model else random_llama(Path(folder))))
        formats = expand_formats(args.formats)
        keys = loaded.index.unit_keys()
        store = DeltaStore(
            lambda key: loaded.handle(key).get(),
            lambda key, f: quantize_dequantize(loaded.handle(key).get(), formats[f]),
            len(formats), limit_bytes=8 << 30,
        )  # fmt: skip
        ids = torch.randint(
            0, loaded.index.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(0)
        )

        def plain() -> None:
            with loaded.requires_grad(keys), torch.enable_grad():
                logits = loaded.logits(ids[None])[0]
                torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()

        out: dict[str, object] = {
            "model": loaded.index.name if args.model else "random Llama",
            "params": loaded.index.params,
            "formats": len(formats),
            "tokens": args.tokens,
        }
        out["precompute_s"] = round(seconds(lambda: [store.get(key) for key in keys]), 2)
        out["stack_bytes"] = store.kept_bytes
        passes = {score: ProbePass(loaded, keys, store, score) for score in ("signs", "labels")}
        times: dict[str, list[float]] = {name: [] for name in ("plain", "signs", "labels", "signs, 1 draw")}
        for _ in range(args.rounds + 1):
            times["plain"].append(seconds(plain))
            for score in passes:
                times[score].append(seconds(lambda score=score: passes[score].run(ids, [0, 1])) / 2)  # type: ignore[misc]
            times["signs, 1 draw"].append(seconds(lambda: passes["signs"].run(ids, [0])))
    best = {name: min(t[1:]) for name, t in times.items()}
    out["plain_s"] = {
        k: round(float(v), 4)
        for k, v in zip(("p20", "p50", "p80"), np.quantile(times["plain"][1:], (0.2, 0.5, 0.8)))
    }
    out["ratio"] = {name: round(t / best["plain"], 3) for name, t in best.items() if name != "plain"}
    out |= {
        "rounds": args.rounds, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "device": platform.machine(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    print(json.dumps(out))
    with Path(args.out).open("a") as lines:
        lines.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
