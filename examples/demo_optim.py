"""Muon with AdamW for the rest: the optimiser of the demo model.

Muon (Jordan 2024, "Muon: An optimizer for hidden layers") replaces each matrix's momentum by its nearest
semi-orthogonal matrix, found with five Newton-Schulz steps. Small models get further on few tokens with it than
with AdamW, and their weights use all directions, which is what makes coarse quantisation hurt.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]

# Coefficients of the quintic iteration, from the author's reference implementation.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the U V^T of each (rows, cols) matrix of a (n, rows, cols) batch, singular values within about [0.7, 1.2]."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # (n, small, large)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, small, small)
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Takes 2-D weights and 3-D stacks of expert weights.

    Args:
        params: tensors (rows, cols) or (experts, rows, cols).
        lr: step, as the rms change of a weight is about ``0.2 * lr * sqrt(max(rows, cols))``.
        momentum: of the gradient average.
        weight_decay: decoupled.
        split: how many matrices lie one after another along the rows of a 3-D stack of the given height
            (fused gate and up: 2), so that each is orthogonalised by itself.
        dtype: of the Newton-Schulz steps; None keeps the gradient's. bfloat16 does (the author's own choice).
    """

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        usual = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": 1, "dtype": dtype}
        super().__init__(params, usual)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                shape = (-1, p.shape[-2] // group["split"], p.shape[-1])
                matrices = orthogonalise(update.reshape(shape).to(group["dtype"] or update.dtype))
                # Moonshot's scale: the same rms of change for every shape.
                scale = 0.2 * max(shape[1], shape[2]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(matrices.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)
