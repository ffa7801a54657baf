"""KL divergence between next-token distributions, from logits, position by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["KlReference", "batch_noise", "token_kl", "token_nll", "top1_changed"]


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


def batch_noise(logits: Callable[[Tensor], Tensor], ids: Tensor, batched: Tensor) -> float:
    """Mean KL of the first sequence in its batch against the same sequence in another batch layout, nats per token.

    Args:
        logits: the model, (B, T) ids -> (B, T, V). ids: the batch. batched: its logits.
    """
    alone = ids[:1] if len(ids) > 1 else ids.expand(2, -1)
    return float(token_kl(batched[:1], logits(alone)[:1]).mean())


class KlReference:
    """The original's distribution, prepared once for many comparisons: KL(original || other) in one exponential pass.

    With u = ln q - ln p up to a constant and u' = u - E_p u:  KL = ln E_p e^u' = ln(1 + E_p [e^u' - 1 - u']), because
    E_p u' = 0; every term is >= 0, as in `token_kl`.

    Args:
        logits: (..., V) of the original.
    """

    def __init__(self, logits: Tensor) -> None:
        self.shape = logits.shape[:-1]
        self._log_p = torch.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), -1)  # (N, V)
        self._p = self._log_p.exp()

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return 2 * self._p.numel() * self._p.element_size()

    def difference(self, other: Tensor, chunk: int = 16) -> Iterator[tuple[slice, Tensor]]:
        """(positions, z (n, V)) with z = sqrt(p) (u - E_p u): half of <z, z> is the KL to second order, of <z, z'> a cross term."""
        flat = other.reshape(self._p.shape)
        for start in range(0, len(flat), chunk):
            part = slice(start, min(start + chunk, len(flat)))
            u = flat[part].float() - self._log_p[part]
            u -= (self._p[part] * u).sum(-1, keepdim=True)
            yield part, u.mul_(self._p[part].sqrt())

    def kl(self, other: Tensor, chunk: int = 16) -> Tensor:
        """(...) float64 on the CPU: KL of every position against other logits (..., V), nats."""
        flat = other.reshape(self._p.shape)
        out = torch.empty(len(flat), dtype=torch.float64)
        for start in range(0, len(flat), chunk):
            part = slice(start, start + chunk)
            p = self._p[part]
            u = flat[part].float() - self._log_p[part]
            u -= (p * u).sum(-1, keepdim=True)
            term = torch.expm1(u).sub_(u).mul_(p).sum(-1, dtype=torch.float64)
            if not torch.isfinite(term).all():  # a ratio beyond e^88: the slow way clamps
                term = torch.expm1(token_kl(self._log_p[part], flat[part]).to(term.device))
            out[part] = torch.log1p(term).cpu()
        return out.reshape(self.shape)


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
