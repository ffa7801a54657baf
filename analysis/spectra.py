"""Eigenvalue spectra of weight matrices through their Gram matrices, and the numbers read off them.

A Gram product is one level-3 call and its eigenvalues are the squared singular values, which is several
times faster than a singular value decomposition and, with products and eigensolver in double precision
where it matters, as exact at the upper end that all tail estimates use.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "farms_eigenvalues",
    "farms_takes_all",
    "gram_eigenvalues",
    "hill_alpha",
    "spectral_entropy",
    "stable_rank",
]

_BLOCK = 1 << 22  # weights in double precision at a time


def gram_eigenvalues(weight: Tensor, exact: bool = False) -> Tensor:
    """Squared singular values of (..., rows, cols), ascending, (..., min(rows, cols)) float64, none below 0.

    Products are float32, which is 1e-7 of the *largest* eigenvalue off and enough for every tail estimate;
    ``exact`` takes them in double precision, for whoever looks at the small end (one matrix at a time).
    """
    w = weight if weight.shape[-1] <= weight.shape[-2] else weight.mT
    if exact:
        n = w.shape[-1]
        gram = torch.zeros(n, n, dtype=torch.float64, device=w.device)
        # Row block by row block, so that an embedding is never held in double precision as a whole.
        for block in w.split(max(1, _BLOCK // n)):
            gram.addmm_(block.T.double(), block.double())
    else:
        gram = (w.mT @ w).to(torch.float64)  # (..., n, n)
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def farms_eigenvalues(
    weight: Tensor, generator: torch.Generator, blocks: int = 256, size: int = 128
) -> Tensor:
    """Pooled squared singular values of at most ``blocks`` random ``size`` x ``size`` tiles, ascending, float64.

    FARMS (arXiv 2506.06280) as AlphaQ runs it: stride ``size``, the remainder at the right and lower edge
    left out; a matrix smaller than a tile in a dimension gives its whole spectrum instead.
    """
    down, across = weight.shape[0] // size, weight.shape[1] // size
    if not down or not across:
        return gram_eigenvalues(weight)
    pick = torch.randperm(down * across, generator=generator)[:blocks].sort().values
    tiles = weight[: down * size, : across * size].reshape(down, size, across, size)
    chosen = tiles[pick // across, :, pick % across]  # (blocks, size, size)
    return gram_eigenvalues(chosen).flatten().sort().values


def farms_takes_all(weight: Tensor, blocks: int = 256, size: int = 128) -> bool:
    """Whether every tile is used, so that another seed changes nothing."""
    return (weight.shape[0] // size) * (weight.shape[1] // size) <= blocks


def hill_alpha(eigenvalues: Tensor, share: float = 0.1, least: int = 10) -> float:
    """PL_Alpha_Hill of ascending eigenvalues (m,): 1 + k / sum_{i<=k} ln(l_{m-i+1} / l_{m-k}).

    k = max(``least``, floor(``share`` m)), clamped to [1, m - 1]. NaN when fewer than two eigenvalues are
    given, when the k-th is zero (rank too low for a tail) or when the tail is flat.
    """
    m = eigenvalues.numel()
    k = max(1, min(m - 1, max(least, int(share * m))))
    if m < 2 or eigenvalues[m - k - 1] <= 0:
        return float("nan")
    total = float((eigenvalues[m - k :].double() / eigenvalues[m - k - 1].double()).log().sum())
    return 1 + k / total if total > 0 else float("nan")


def stable_rank(eigenvalues: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2; NaN for a weight of zeros."""
    top = float(eigenvalues[-1])
    return float(eigenvalues.sum()) / top if top > 0 else float("nan")


def spectral_entropy(eigenvalues: Tensor) -> float:
    """-sum p ln p / ln m with p = l / sum l: 1 for a flat spectrum, 0 for rank one; NaN for a weight of zeros."""
    total, m = float(eigenvalues.sum()), eigenvalues.numel()
    if total <= 0 or m < 2:
        return float("nan")
    return float(torch.special.entr(eigenvalues / total).sum() / torch.log(torch.tensor(float(m))))
