"""Eigenvalue spectra of weight matrices through their Gram matrices, and the numbers read off them.

A Gram product is one level-3 call and its eigenvalues are the squared singular values, several times faster than a
singular value decomposition. Single precision leaves an error that is small against the *root mean square* eigenvalue. The
eigenvalues that this drowns are taken anew in the space of their vectors; what all errors together can do to the
power-law fit and to the log-determinant is bounded, and where that is too much, all is repeated in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.linalg import blas, lapack
from torch import Tensor

from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.power_law import THRESHOLD, PowerLaw, fit_power_law
from bitatlas.analysis.schema import QuantUnit
from bitatlas.kernels import eigen

__all__ = [
    "FARMS_TILE",
    "farms_eigenvalues",
    "farms_pick",
    "farms_takes_all",
    "farms_tiles",
    "gram_eigenvalues",
    "hill_alpha",
    "slab_spectrum",
    "spectral_entropy",
    "stable_rank",
    "tiles_hill",
    "unit_spectrum",
]

Slabs = Callable[[], Iterable[Tensor]]

FARMS_TILE = 128
_BLOCK = 1 << 22  # weights in double precision at a time
_SMALL_END = 1e-5  # of the largest: below, LAPACK's single precision is more than a few per cent off there
_MOST_DOUBLE = 8192  # rows of a Gram matrix in double precision: 512 MiB
# How far off our single precision leaves any eigenvalue as a rule; tests hold both.
_ROUNDING = 1e-6  # of the root mean square eigenvalue, and
_RELATIVE = 1e-6  # of itself
_POOR = 2e-2  # of an eigenvalue: where the rounding may be more, it is taken anew
_MOST_ANEW = 48  # so many at most; more of them cost as much as double precision
_MOST_OFF = 1e-3  # of the log-determinant


def unit_spectrum(ctx: MeasureContext, unit: QuantUnit) -> tuple[np.ndarray, PowerLaw]:
    """Ascending squared singular values of a unit, (min(rows, cols),) float64, and their tail; made once for all who ask in turn."""
    n, square = min(unit.rows, unit.cols), unit.rows == unit.cols
    make = lambda: slab_spectrum(lambda: ctx.slabs(unit), n, square)  # noqa: E731
    found: tuple[np.ndarray, PowerLaw] = ctx.of_unit(unit, "spectrum", make)
    return found


def slab_spectrum(slabs: Slabs, n: int, square: bool = False) -> tuple[np.ndarray, PowerLaw]:
    """Squared singular values, ascending (n,) float64, of the matrix whose (rows, n) float32 row blocks ``slabs()`` gives.

    ``slabs`` is called again where single precision alone does not do. LAPACK, which takes what is too large for our
    own kernel, takes a ``square`` matrix in double precision at once, as its smallest eigenvalues are next to nothing.
    """
    if eigen.available(n):
        found = _single(slabs, n)
        if found:
            return found
        values = eigen.slab_eigenvalues(slabs(), n, True).numpy()
        return values, fit_power_law(values)
    for double in (True,) if square and n <= _MOST_DOUBLE else (False, True):
        values = _eigenvalues(_gram(slabs(), n, np.float64 if double else np.float32))
        if values[0] >= _SMALL_END * values[-1] or n > _MOST_DOUBLE:
            break
    return values, fit_power_law(values)


def _single(slabs: Slabs, n: int) -> tuple[np.ndarray, PowerLaw] | None:
    """Spectrum and tail in single precision; None where that might give another xmin or log-determinant than double."""
    form = eigen.Reduced(slabs(), n)
    values: np.ndarray = form.values.double().numpy()
    mean, rounding = float(np.square(values).mean()) ** 0.5, _rounding(form)
    wrong = _RELATIVE * values + rounding
    poor = int(np.searchsorted(values, rounding / _POOR))
    if poor and values[poor - 1] + wrong[poor - 1] > THRESHOLD:
        count = -(-poor // 16) * 16
        if count > min(_MOST_ANEW, n - 1):
            return None
        values[:count] = form.smallest(slabs(), count, rounding).numpy()
        # Second order in the rounding of the vectors, first in that of the matrix's product with them.
        product = 1e-7 * mean**0.5
        wrong[:count] = rounding**2 / values[count] + product * (2 * values[:count] ** 0.5 + product)
        wrong[:count] += _RELATIVE * values[:count]
    if not np.isfinite(values).all() or bool((np.abs(values - THRESHOLD) <= wrong).any()):
        return None
    values, known = np.sort(values), values > THRESHOLD
    off = np.divide(wrong, values, out=np.zeros(n), where=known)
    if known.any() and off.sum() > _MOST_OFF * known.sum():
        return None
    fit = fit_power_law(values, off)
    return (values, fit) if fit.sure else None


def _rounding(form: eigen.Reduced) -> float:
    """Bound of what rounding adds to or takes from any eigenvalue in single precision, a share of itself apart.

    Each rounding is small against the largest eigenvalue, and spread over all directions it mostly cancels: what one
    direction sees goes with the root mean square. Less is spread where few eigenvalues are nearly all, least where their
    vectors lie along axes, which a heavy column shows.
    """
    values = form.values.double()
    square, top = float(values.square().mean()), float(values[-1])
    if square * len(values) >= 4 * top * top:
        return _ROUNDING * square**0.5
    return _ROUNDING * (2 * square**0.5 + 1.5 * form.heaviest)


def gram_eigenvalues(weight: Tensor, exact: bool = False) -> Tensor:
    """Squared singular values of (..., rows, cols), ascending, (..., min(rows, cols)) float64, none below 0.

    Products are float32, unless ``exact`` takes them in double precision (one matrix at a time).
    """
    w = weight if weight.shape[-1] <= weight.shape[-2] else weight.mT
    if exact:
        return torch.from_numpy(_eigenvalues(_gram([w], w.shape[-1], np.float64)))
    gram = (w.mT @ w).to(torch.float64)  # (..., n, n)
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def _gram(slabs: Iterable[Tensor], n: int, dtype: type) -> np.ndarray:
    """Upper triangle of the sum of B^T B, (n, n) in column order, its lower triangle unset."""
    syrk = blas.ssyrk if dtype is np.float32 else blas.dsyrk
    gram: np.ndarray = np.zeros((n, n), dtype, order="F")
    for slab in slabs:
        for block in slab.split(max(1, _BLOCK // n)) if dtype is np.float64 else (slab,):
            rows: np.ndarray = block.numpy().astype(dtype, copy=False)  # (rows, n)
            # The transpose of a C-ordered block is Fortran-ordered, so neither case is copied.
            a, trans = (rows.T, 0) if rows.flags.c_contiguous else (rows, 1)
            gram = syrk(1.0, a, beta=1.0, c=gram, trans=trans, overwrite_c=1)
    return gram


def _eigenvalues(gram: np.ndarray) -> np.ndarray:
    """Ascending eigenvalues (n,) float64, none below 0, of the upper triangle of ``gram``, which is overwritten."""
    n = len(gram)
    if n == 1:
        return gram[0].astype(np.float64).clip(0)
    reduce = lapack.ssytrd if gram.dtype == np.float32 else lapack.dsytrd
    _, diagonal, beside, _, bad = reduce(gram, lower=0, overwrite_a=1, lwork=64 * n)
    # Values only, without square roots; from here on double precision costs next to nothing.
    values, failed = lapack.dsterf(diagonal.astype(np.float64), beside.astype(np.float64))
    if bad or failed:
        raise ArithmeticError(f"the eigensolver did not converge ({bad}, {failed})")
    found: np.ndarray = values.clip(0)
    return found


def farms_pick(
    rows: int, cols: int, generator: torch.Generator, blocks: int = 256, size: int = FARMS_TILE
) -> Tensor:
    """Which ``size`` x ``size`` tiles of a (rows, cols) matrix FARMS takes: at most ``blocks`` of them, ascending."""
    total = (rows // size) * (cols // size)
    return torch.randperm(total, generator=generator)[:blocks].sort().values


def farms_tiles(blocks: Iterable[Tensor], picks: list[Tensor], size: int = FARMS_TILE) -> list[Tensor]:
    """The picked tiles, (tiles, size, size) for each pick, of the matrix whose row blocks (n, cols) are given.

    Every row block but the last has a multiple of ``size`` rows.
    """
    found: list[list[Tensor]] = [[] for _ in picks]
    first = 0
    for block in blocks:
        down, across = block.shape[0] // size, block.shape[1] // size
        for pick, out in zip(picks, found):
            here = pick[(pick >= first) & (pick < first + down * across)] - first
            places = [(i // across * size, i % across * size) for i in here.tolist()]
            # Copied at once, so that no block is kept alive.
            if places:
                out.append(torch.stack([block[r : r + size, c : c + size] for r, c in places]))
        first += down * across
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]


def farms_eigenvalues(
    weight: Tensor, generator: torch.Generator, blocks: int = 256, size: int = FARMS_TILE
) -> Tensor:
    """Pooled squared singular values of at most ``blocks`` random ``size`` x ``size`` tiles, ascending, float64.

    FARMS (arXiv 2506.06280) as AlphaQ runs it: stride ``size``, the remainder at the right and lower edge
    left out; a matrix smaller than a tile in a dimension gives its whole spectrum instead.
    """
    if min(weight.shape) < size:
        return gram_eigenvalues(weight)
    pick = farms_pick(weight.shape[0], weight.shape[1], generator, blocks, size)
    return gram_eigenvalues(farms_tiles([weight], [pick], size)[0]).flatten().sort().values


def tiles_hill(tiles: Tensor) -> float:
    """PL_Alpha_Hill over the pooled squared singular values of (tiles, size, size)."""
    own = eigen.available(tiles.shape[-1])
    found = eigen.tile_eigenvalues(tiles) if own else gram_eigenvalues(tiles)
    return hill_alpha(found.flatten().sort().values)


def farms_takes_all(rows: int, cols: int, blocks: int = 256, size: int = FARMS_TILE) -> bool:
    """Whether every tile is used, so that another seed changes nothing."""
    return (rows // size) * (cols // size) <= blocks


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
