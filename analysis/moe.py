"""Routed experts seen from a metric: which units they are, what the router decided, how far few tokens are trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import ModelIndex, QuantUnit
from bitatlas.analysis.unit_map import expert_modules
from bitatlas.kernels.errors import UserError

__all__ = ["chosen_mask", "expert_slots", "require_experts", "routed_modules", "shrunk", "watch_routing"]

Routed = Callable[[int, Tensor, Tensor, Tensor], None]
"""(layer, hidden (n, d), chosen experts (n, k), their weights (n, k))."""


def expert_slots(index: ModelIndex) -> dict[tuple[int, int], list[QuantUnit]]:
    """(layer, routed expert) -> its units, in index order."""
    found: dict[tuple[int, int], list[QuantUnit]] = {}
    for u in index.units:
        if u.expert >= 0:
            found.setdefault((u.layer, u.expert), []).append(u)
    return found


def require_experts(index: ModelIndex) -> dict[tuple[int, int], list[QuantUnit]]:
    """`expert_slots` of a model that has some.

    Raises:
        UserError: a dense model, or experts that are not chosen by a list of the top k (Llama 4).
    """
    slots = expert_slots(index)
    if not slots:
        raise UserError(
            "this model has no routed experts",
            found=f"{index.name} ({index.model_type}), {index.n_layers} dense layers",
            fix="measure another metric; `bitatlas metrics` lists them",
        )
    if index.model_type.startswith("llama4"):
        raise UserError(
            "the experts of this architecture get all tokens, scaled, and no list of chosen ones",
            found=index.model_type,
            fix="`routing` and `activation_error` work for it",
        )
    return slots


def routed_modules(loaded: LoadedModel) -> dict[int, nn.Module]:
    """Layer -> module of the fused experts whose forward takes (hidden, chosen experts, weights).

    Raises:
        UserError: none is of that kind.
    """
    found = {k: m for k, m in expert_modules(loaded.model).items() if hasattr(m, "_apply_gate")}
    if not found:
        raise UserError(
            "the experts of this architecture are not one fused module a layer",
            found=type(loaded.model).__name__,
            fix="`routing` and `activation_error` work for it",
        )
    return found


@contextmanager
def watch_routing(loaded: LoadedModel, watch: Routed) -> Iterator[None]:
    """Tells ``watch`` every routing decision of any forward inside the block, gradients cut off."""

    def hook(layer: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args)) | kwargs
            x, chosen, weight = given["hidden_states"], given["top_k_index"], given["top_k_weights"]
            watch(layer, x.detach().reshape(-1, x.shape[-1]), chosen.detach(), weight.detach())

        return before

    modules = routed_modules(loaded)
    handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chosen_mask(chosen: Tensor, experts: int) -> Tensor:
    """(n, experts) bool: which experts a token goes to; indices beyond the last mean "none"."""
    mask = torch.zeros(len(chosen), experts + 1, dtype=torch.bool, device=chosen.device)
    mask.scatter_(1, chosen.clamp(max=experts), True)
    return mask[:, :experts]


def shrunk(value: np.ndarray, count: np.ndarray, prior: float) -> np.ndarray:
    """Means of few samples drawn towards the others: (n v + k m) / (n + k), m the mean over all samples.

    Args:
        value: (E,) means of each expert; NaN where ``count`` is 0, and NaN it stays: unknown is not the average.
        count: (E,) samples behind each.
        prior: k, how many samples the common mean is worth.
    """
    known = count > 0
    if not known.any():
        return np.full(len(value), np.nan)
    common = float(np.average(value[known], weights=count[known]))
    return np.where(known, (count * np.where(known, value, 0.0) + prior * common) / (count + prior), np.nan)
