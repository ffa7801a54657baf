"""Kronecker factors: second moments of what enters a product and of the gradient that comes back to it.

A unit's Fisher block is taken for (sum of d d^T) x (mean of x x^T): K-FAC (Martens & Grosse 2015, eq. 3), with d the gradient of a
random score summed over the whole sequence. A side that is wider than a limit (a head's vocabulary) is not kept whole:
random signs mix its vectors into a few, S, with E[S^T S] / k the same matrix, so that traces stay unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitatlas.analysis.fisher.probes import score_gradient
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.products import watch_products

__all__ = ["FactorPass", "Factors", "Moment", "basis_of", "kfac_values"]


class Moment:
    """Sum of x x^T over tokens, in buckets of sequences.

    Args:
        dim: length of a vector.
        widest: kept as a matrix up to this length, as ``sketch`` mixtures beyond.
        buckets: how many sums.

    Attributes:
        kept: (buckets, dim, dim), or (buckets, sketch, dim), float32.
        count: (buckets,) float64, vectors added.
    """

    def __init__(self, dim: int, widest: int, sketch: int, buckets: int, device: torch.device) -> None:
        self.dense = dim <= widest
        self.kept = torch.zeros((buckets, dim if self.dense else sketch, dim), device=device)
        self.count = torch.zeros(buckets, dtype=torch.float64)

    def add(self, x: Tensor, bucket: int, seed: int) -> None:
        """Adds x (n, dim)."""
        x = x.float()
        self.count[bucket] += len(x)
        if self.dense:
            self.kept[bucket].addmm_(x.T, x)
            return
        k = self.kept.shape[1]
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (k, len(x)), generator=generator, dtype=torch.int8)
        self.kept[bucket].addmm_((signs.to(x.device).float() * 2 - 1) / k**0.5, x)

    def total(self) -> Tensor:
        """(dim, dim) sum over buckets of a dense moment."""
        assert self.dense
        return self.kept.sum(0)


@dataclass
class Factors:
    """Moments of one unit.

    Attributes:
        inputs: of x (cols), shared by units that read the same input; None for a lookup.
        outputs: of the gradient at the output (rows), or at the looked-up vectors (cols) for a lookup.
        counts: (rows,) how often each row was looked up, by bucket (buckets, rows); None for a product.
    """

    inputs: Moment | None = None
    outputs: Moment | None = None
    counts: Tensor | None = None
    lookup_outputs: Moment | None = field(default=None)


class FactorPass:
    """Gathers the factors of some units, one forward and one backward per sequence and draw.

    Args:
        loaded: the model.
        units: keys.
        score: see `analysis.fisher.probes`.
        widest, sketch, buckets: see `Moment`.

    Attributes:
        factors: unit key -> what was found; empty moments where nothing arrived.
        tokens: (buckets,) float64, weight of the positions times draws.
    """

    def __init__(
        self, loaded: LoadedModel, units: Sequence[str], score: str, *, widest: int, sketch: int, buckets: int
    ) -> None:
        self.factors = {u: Factors() for u in units}
        self.tokens = torch.zeros(buckets, dtype=torch.float64)
        self._loaded, self._units, self._score = loaded, tuple(units), score
        self._options = widest, sketch, buckets, loaded.device
        self._number = {u: i for i, u in enumerate(units)}
        self._bucket, self._seed = 0, 0
        self._recent: list[tuple[Tensor, str]] = []

    def run(
        self, tokens: Tensor, seeds: Sequence[int], bucket: int = 0, weights: Tensor | None = None
    ) -> None:
        """Adds one sequence (T,), its positions weighted (T,), to a bucket; one draw for each seed."""
        self._bucket, self._seed = bucket, seeds[0]
        with torch.enable_grad(), watch_products(self._loaded, self._units, self._on_input, self._on_output):
            logits = self._loaded.logits(tokens.unsqueeze(0))[0]  # (T, V)
            for i, seed in enumerate(seeds):
                self._seed = seed
                generator = torch.Generator().manual_seed(seed)
                v = score_gradient(logits, self._score, generator, next_tokens=tokens[1:])
                if weights is not None:
                    v *= weights.sqrt().to(v.device)[:, None]
                logits.backward(v, retain_graph=i + 1 < len(seeds))
        self._recent.clear()
        total = len(tokens) if weights is None else float(weights.sum())
        self.tokens[bucket] += total * len(seeds)

    def _moment(self, dim: int) -> Moment:
        widest, sketch, buckets, device = self._options
        return Moment(dim, widest, sketch, buckets, device)

    def _mix(self, unit: str, side: int) -> int:
        return (self._seed ^ (2 * self._number[unit] + side) * 0x9E3779B97F4A7C15) & (2**62 - 1)

    def _on_input(self, units: Sequence[str], x: Tensor) -> None:
        mine = [self.factors[u] for u in units if u in self.factors]
        if not x.is_floating_point():
            rows = self._loaded.handle(units[0]).unit.rows
            if mine[0].counts is None:
                mine[0].counts = torch.zeros((self._options[2], rows), dtype=torch.float64)
            mine[0].counts[self._bucket] += torch.bincount(x.cpu(), minlength=rows)
            return
        # Inputs are compared by address; holding the last few keeps their addresses from being used again.
        leader = next(
            (u for seen, u in self._recent if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape), None
        )
        if leader is None:
            leader = units[0]
            first = self.factors[leader]
            if first.inputs is None:
                first.inputs = self._moment(x.shape[1])
            first.inputs.add(x, self._bucket, self._mix(leader, 0))
            self._recent = [*self._recent[-3:], (x, leader)]
        for f in mine:
            f.inputs = self.factors[leader].inputs

    def _on_output(self, unit: str, delta: Tensor, lookup: bool) -> None:
        f = self.factors[unit]
        found = f.lookup_outputs if lookup else f.outputs
        if found is None:
            found = self._moment(delta.shape[1])
            if lookup:
                f.lookup_outputs = found
            else:
                f.outputs = found
        found.add(delta, self._bucket, self._mix(unit, 1))


def kfac_values(f: Factors, error: Tensor) -> Tensor:
    """tr(G dW A dW^T) by buckets, linearised: the values of all buckets add up to the trace over all text.

    Args:
        f: the factors; error: (rows, cols) float32.

    Returns:
        (buckets,) float64: the bucket's own gradients against all inputs, plus what its inputs change.
    """
    out = torch.zeros(0, dtype=torch.float64)
    if f.inputs is not None and f.outputs is not None:
        out = _product_values(f.inputs, f.outputs, error)
    if f.counts is not None and f.lookup_outputs is not None:
        found = _lookup_values(f.counts.to(error.device), f.lookup_outputs, error)
        out = found if not len(out) else out + found
    return out


def _product_values(a: Moment, g: Moment, error: Tensor) -> Tensor:
    n = float(a.count.sum())
    if not n:
        return torch.zeros(len(g.kept), dtype=torch.float64)
    own = _inner(_right(error, a), error, g, rows=True) / n  # tr(G_b dW A dW^T)
    inputs = _inner(_left(error, g), error, a, rows=False) / n  # tr(G dW A_b dW^T)
    return own + inputs - (a.count / n) * own.sum()


def _right(x: Tensor, a: Moment) -> Tensor:
    """x A, A the whole moment of the columns."""
    if a.dense:
        return x @ a.total()
    mixtures = a.kept.flatten(0, 1)
    return (x @ mixtures.T) @ mixtures


def _left(x: Tensor, g: Moment) -> Tensor:
    """G x, G the whole moment of the rows."""
    if g.dense:
        return g.total() @ x
    mixtures = g.kept.flatten(0, 1)
    return mixtures.T @ (mixtures @ x)


def _inner(x: Tensor, y: Tensor, m: Moment, rows: bool) -> Tensor:
    """(buckets,) <M_b x, y>, M_b a moment of the rows, else <x M_b, y>; on the CPU."""
    if m.dense:
        product = x @ y.T if rows else x.T @ y
        return torch.stack([(kept * product).sum(dtype=torch.float64) for kept in m.kept]).cpu()
    out = []
    for s in m.kept:
        left, right = (s @ x, s @ y) if rows else (x @ s.T, y @ s.T)
        out.append((left * right).sum(dtype=torch.float64))
    return torch.stack(out).cpu()


def _lookup_values(counts: Tensor, g: Moment, error: Tensor) -> Tensor:
    n = counts.sum()
    if not n:
        return torch.zeros(len(counts), dtype=torch.float64)
    kept = g.kept.double()
    wide = error.double()
    by_bucket = []
    every = torch.zeros(len(wide), dtype=torch.float64, device=wide.device)
    for part in kept:
        energy = ((wide @ part) * wide).sum(1) if g.dense else (wide @ part.T).square().sum(1)  # (rows,)
        by_bucket.append((counts.sum(0) * energy).sum() / n)
        every += energy
    own = torch.stack(by_bucket)
    inputs = counts @ every / n
    return (own + inputs - counts.sum(1) / n * own.sum()).cpu()


def basis_of(f: Factors) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvectors (as columns) of the rows' and the columns' moment; None = the coordinates themselves.

    A side that is only known through mixtures keeps its coordinates. Where a matrix is both looked up and multiplied by
    (a tied embedding), the product decides.
    """
    left = f.outputs if f.outputs is not None else None
    right = f.inputs if f.inputs is not None else f.lookup_outputs
    return _eigenvectors(left), _eigenvectors(right)


def _eigenvectors(m: Moment | None) -> Tensor | None:
    if m is None or not m.dense:
        return None
    total = m.total().double()
    vectors: Tensor = torch.linalg.eigh(0.5 * (total + total.T))[1]
    return vectors.float()
