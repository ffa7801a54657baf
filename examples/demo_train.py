"""What the scripts that train a model share: one loop over random windows of text, its schedule, and the saved folder."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Loss", "save", "schedule", "train_loop"]

Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(batch, context) tokens -> what is minimised, and the figures to print."""


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_loop(
    model: PreTrainedModel,
    ids: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Loss,
    args: argparse.Namespace,
    keep: Callable[[int], None] | None = None,
) -> int:
    """Train on random windows of ``ids`` (tokens,); how many tokens were seen.

    The last quarter of the steps doubles the context and halves the batch.

    Args:
        args: ``steps``, ``batch`` (sequences of ``context`` tokens), ``warmup`` and ``seed`` are read.
        keep: called with the number of finished steps after each but the last.
    """
    groups = [g for o in optimizers for g in o.param_groups]
    peaks = [g["lr"] for g in groups]
    generator = torch.Generator().manual_seed(args.seed)
    seen, began = 0, time.perf_counter()
    model.train()
    for step in range(args.steps):
        long = step >= args.steps * 3 // 4
        batch, context = (max(1, args.batch // 2), args.context * 2) if long else (args.batch, args.context)
        starts = torch.randint(0, len(ids) - context, (batch,), generator=generator)
        tokens = torch.stack([ids[s : s + context] for s in starts.tolist()])  # (batch, context)
        factor = schedule(step, args.steps, args.warmup)
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * factor
        total, shown = loss(tokens)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += batch * context
        if step % 50 == 49 or step == args.steps - 1:
            rate = seen / (time.perf_counter() - began)
            words = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"step {step + 1}/{args.steps}  {words}  {rate:.0f} tokens/s", flush=True)
        if keep and step + 1 < args.steps:
            keep(step + 1)
    return seen


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, shards: int = 1) -> None:
    """Write the checkpoint in bf16, in ``shards`` files or one more."""
    if folder.exists():
        shutil.rmtree(folder)
    size = sum(p.numel() for p in model.parameters()) * 2
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=size // shards + 1)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that older readers do not know; this one means the same to both.
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for file in folder.iterdir():
        file.chmod(0o644)
