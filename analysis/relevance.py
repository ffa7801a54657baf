"""Rules of layer-wise relevance propagation, as changes of the gradient: relevance of a value z is z times its gradient.

- a linear map with the epsilon rule, R_i = sum_j x_i w_ji / (z_j + eps sign z_j) R_j, is the ordinary gradient after
  the output's own was multiplied by z / (z + eps sign z);
- activations and norms hand their relevance on unchanged (the denominator of a norm is a constant);
- a product of two inputs gives half to each: gate and up, attention weights and values, queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Record", "linear_rule", "relevance_rules", "unchanged_rule"]

Record = Callable[[Tensor], None]
"""Told the relevance of an output, in the output's shape, while gradients flow back."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, share: Tensor, epsilon: float, record: Record | None) -> Tensor:
        ctx.save_for_backward(z, share)
        ctx.epsilon, ctx.record = epsilon, record
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        z, share = ctx.saved_tensors
        gradient = gradients[0] * share
        if ctx.record is not None:
            ctx.record(z * gradient)
        return gradient * (z / _away_from_zero(z, ctx.epsilon)), None, None, None


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.epsilon = epsilon
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        return gradients[0] * (y / _away_from_zero(x, ctx.epsilon)), None, None


def _away_from_zero(z: Tensor, epsilon: float) -> Tensor:
    return z + torch.where(z >= 0, epsilon, -epsilon)


def linear_rule(
    z: Tensor, epsilon: float, record: Record | None = None, share: Tensor | float = 1.0
) -> Tensor:
    """The output of a linear map with the epsilon rule behind it; ``share`` (scalar or per feature) of its relevance is its own."""
    own: Tensor = _Linear.apply(z, torch.as_tensor(share, dtype=z.dtype, device=z.device), epsilon, record)
    return own


def unchanged_rule(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """``y`` = f(x), elementwise or a norm, that hands its relevance on to x unchanged."""
    own: Tensor = _Unchanged.apply(x, y.detach(), epsilon)
    return own


@contextmanager
def relevance_rules(model: nn.Module, epsilon: float) -> Iterator[None]:
    """Norms and activation modules of ``model`` hand relevance on unchanged inside the block."""

    def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        plain = len(args) == 1 and isinstance(out, Tensor) and args[0].shape == out.shape
        return unchanged_rule(args[0], out, epsilon) if plain else None

    handles = [m.register_forward_hook(hook) for m in model.modules() if _hands_on(m)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hands_on(module: nn.Module) -> bool:
    home = type(module).__module__
    activation = home.startswith(("transformers.activations", "torch.nn.modules.activation"))
    return (activation or "norm" in type(module).__name__.lower()) and not any(module.children())
