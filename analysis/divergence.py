"""KL divergence between next-token distributions, from logits, position by position."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_kl", "token_nll", "top1_changed"]


def token_kl(reference: Tensor, other: Tensor, chunk: int = 64) -> Tensor:
    """KL(softmax(reference) || softmax(other)) of every position, nats.

    Computed as sum p (e^d - 1 - d) with d = ln q - ln p: every term is >= 0, so that a KL of 1e-6 is not
    the difference of two large numbers.

    Args:
        reference, other: (..., V) logits, any float type; float32 over ``chunk`` positions, summed in float64.

    Returns:
        (...) float64, on the CPU.
    """
    vocab = reference.shape[-1]
    ref, oth = reference.reshape(-1, vocab), other.reshape(-1, vocab)
    out = torch.empty(ref.shape[0], dtype=torch.float64)
    for start in range(0, ref.shape[0], chunk):
        lp = torch.log_softmax(ref[start : start + chunk].float(), dim=-1)
        lq = torch.log_softmax(oth[start : start + chunk].float(), dim=-1)
        p = lp.exp()
        d = (lq - lp).clamp_max_(80.0)  # exp stays finite; beyond that q alone counts
        term = torch.where(p > 0, p * (torch.expm1(d) - d), lq.exp())
        out[start : start + chunk] = term.sum(-1, dtype=torch.float64).cpu()
    return out.reshape(reference.shape[:-1])


def top1_changed(reference: Tensor, other: Tensor) -> Tensor:
    """(...) bool on the CPU: the most likely token is another one; logits (..., V)."""
    return (reference.argmax(-1) != other.argmax(-1)).cpu()


def token_nll(logits: Tensor, ids: Tensor, chunk: int = 64) -> Tensor:
    """-ln p(next token) of every position but the last, nats.

    Args:
        logits: (B, T, V); ids: (B, T) int64.

    Returns:
        (B, T - 1) float64, on the CPU.
    """
    vocab = logits.shape[-1]
    flat, target = logits[:, :-1].reshape(-1, vocab), ids[:, 1:].reshape(-1).to(logits.device)
    out = torch.empty(flat.shape[0], dtype=torch.float64)
    for start in range(0, flat.shape[0], chunk):
        part = flat[start : start + chunk].float()
        picked = part.gather(-1, target[start : start + chunk, None])[:, 0]
        out[start : start + chunk] = (torch.logsumexp(part, -1) - picked).double().cpu()
    return out.reshape(ids.shape[0], ids.shape[1] - 1)
