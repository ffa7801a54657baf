"""Quantisation errors Q(W) - W of every unit in every format, kept compact so that a probe is a matrix-vector product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DeltaStack", "DeltaStore", "RotatedStore", "make_stack"]

# |<g, d>| <= |g| |d| = 2**15 stays inside float16 (65504) whatever the vectors are.
_G_NORM = 2.0**8
_D_NORM = 2.0**7


@dataclass(frozen=True, slots=True)
class DeltaStack:
    """The errors of one unit.

    Attributes:
        rows: (F, n) float16 or float32; row f is (Q_f(W) - W).flatten() / scale[f].
        scale: (F,) float64, what a row was divided by; 0 where the format is exact for this unit.
        norm_sq: (F,) float64, ||Q_f(W) - W||^2.
        square: rows hold the squares of the errors, and gradients are squared too.
    """

    rows: Tensor
    scale: Tensor
    norm_sq: Tensor
    square: bool = False

    @property
    def nbytes(self) -> int:
        """Memory of the stack."""
        return self.rows.numel() * self.rows.element_size()

    def dot(self, grad: Tensor) -> tuple[Tensor, float]:
        """Inner products with a gradient.

        Args:
            grad: any shape with n elements, float32.

        Returns:
            <grad, Q_f(W) - W> for every format, (F,) float64, and ||grad||^2; of squares, <grad^2, (Q_f(W) - W)^2>.
        """
        flat = grad.reshape(-1).float()
        total = norm = float(torch.linalg.vector_norm(flat))
        if self.square and norm > 0:
            flat = (
                flat / norm
            ).square_()  # first scaled: the square of a small gradient leaves float32's range
            norm = float(torch.linalg.vector_norm(flat))
        if norm == 0.0 or not self.rows.numel():
            return torch.zeros_like(self.scale), 0.0
        if self.rows.dtype == torch.float16:
            factor = _G_NORM / norm
            out = torch.mv(self.rows, (flat * factor).to(torch.float16)).double().cpu() / factor
        else:
            out = torch.mv(self.rows, flat.to(self.rows.dtype)).double().cpu()
        return out * self.scale * (total * total if self.square else 1.0), total * total


def make_stack(
    weight: Tensor, candidates: Sequence[Tensor], dtype: torch.dtype, device: str, square: bool = False
) -> DeltaStack:
    """Stack of candidates - weight.

    Args:
        weight: (rows, cols) float32, the original.
        candidates: F tensors of the same shape, what each format turns it into.
        dtype: float16 (compact; relative error of a product about 2e-4) or float32.
        square: keep the squares of the errors.
    """
    rows = torch.empty((len(candidates), weight.numel()), dtype=dtype, device=device)
    scale = torch.zeros(len(candidates), dtype=torch.float64)
    norm_sq = torch.zeros(len(candidates), dtype=torch.float64)
    for f, candidate in enumerate(candidates):
        delta = (candidate - weight).reshape(-1)
        norm = float(torch.linalg.vector_norm(delta.double()))
        norm_sq[f] = norm * norm
        if square:
            delta = delta.square()
            norm = float(torch.linalg.vector_norm(delta.double()))
        scale[f] = norm / _D_NORM
        rows[f] = delta * (_D_NORM / norm) if norm > 0 else torch.zeros_like(delta)
    return DeltaStack(rows, scale, norm_sq, square)


class DeltaStore:
    """Stacks made on first use and kept while they fit; what does not fit is made again each time it is asked for.

    Args:
        weight: unit key -> (rows, cols) float32 original.
        candidate: (unit key, format index) -> (rows, cols) float32.
        n_formats: F.
        limit_bytes: RAM for kept stacks.
        dtype: of the stacks.
        device: where the gradients will be.
        square: squares of the errors, for diagonals.
    """

    def __init__(
        self,
        weight: Callable[[str], Tensor],
        candidate: Callable[[str, int], Tensor],
        n_formats: int,
        *,
        limit_bytes: int,
        dtype: torch.dtype = torch.float16,
        device: str = "cpu",
        square: bool = False,
    ) -> None:
        self._weight, self._candidate = weight, candidate
        self.n_formats = n_formats
        self._limit, self._dtype, self._device, self._square = limit_bytes, dtype, device, square
        self._kept: dict[str, DeltaStack] = {}
        self._norms: dict[str, Tensor] = {}
        self.kept_bytes = 0

    def get(self, key: str) -> DeltaStack:
        """The stack of one unit."""
        if key in self._kept:
            return self._kept[key]
        candidates = [self._candidate(key, f) for f in range(self.n_formats)]
        stack = make_stack(self._weight(key), candidates, self._dtype, self._device, self._square)
        self._norms[key] = stack.norm_sq
        if self.kept_bytes + stack.nbytes <= self._limit:
            self._kept[key] = stack
            self.kept_bytes += stack.nbytes
        return stack

    def norm_sq(self, key: str) -> Tensor:
        """(F,) float64 squared norms of the errors of one unit."""
        if key not in self._norms:
            self.get(key)
        return self._norms[key]


Basis = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class _RotatedStack:
    """A stack in the eigenbasis of a unit: gradients are rotated before they are squared."""

    inner: DeltaStack
    basis: Basis

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def norm_sq(self) -> Tensor:
        return self.inner.norm_sq

    def dot(self, grad: Tensor) -> tuple[Tensor, float]:
        return self.inner.dot(_rotated(grad.float(), self.basis))


class RotatedStore(DeltaStore):
    """Squares of errors, and of gradients, in a basis of each unit's own: U_left^T x U_right.

    Args:
        basis: unit key -> (left (rows, rows) or None, right (cols, cols) or None), orthogonal.
    """

    def __init__(
        self,
        weight: Callable[[str], Tensor],
        candidate: Callable[[str, int], Tensor],
        n_formats: int,
        *,
        limit_bytes: int,
        basis: Mapping[str, Basis],
        device: str = "cpu",
    ) -> None:
        self._basis = basis

        def rotated_candidate(key: str, f: int) -> Tensor:
            # The error alone is rotated: that of two matrices would lose digits.
            return _rotated((candidate(key, f) - weight(key)).to(device), basis[key])

        def origin(key: str) -> Tensor:
            return torch.zeros(1, device=device).expand_as(weight(key))

        super().__init__(
            origin, rotated_candidate, n_formats, limit_bytes=limit_bytes, device=device, square=True
        )

    def get(self, key: str) -> DeltaStack:
        """The stack of one unit."""
        return _RotatedStack(super().get(key), self._basis[key])  # type: ignore[return-value]


def _rotated(x: Tensor, basis: Basis) -> Tensor:
    left, right = basis
    x = x if left is None else left.T @ x
    return x if right is None else x @ right
