"""Readers of the cache: a plan of formats, and probes whose gradient is that of the packed part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitatlas.analysis.kv.tap import Attention, KvRead
from bitatlas.kernels.kv.formats import KvLayout, KvPair
from bitatlas.kernels.kv.quantize import quantize_dequantize_kv, to_16_bits

__all__ = ["GradientReader", "OutputReader", "PlanReader"]


class PlanReader:
    """Every layer of the plan read in its formats; the same numbers as `PackedKvCache`, token by token.

    Args:
        plan: layer -> formats; other layers stay as they are.
        layout: rules of the 16-bit window.
    """

    def __init__(self, plan: Mapping[int, KvPair], layout: KvLayout) -> None:
        self.plan, self.layout = dict(plan), layout

    def read(self, layer: int, k: Tensor, v: Tensor) -> KvRead | None:
        """Packed and plain K and V of the layer."""
        pair = self.plan.get(layer)
        if pair is None:
            return None
        block = self.layout.block
        packed = quantize_dequantize_kv(k, pair.k, block), quantize_dequantize_kv(v, pair.v, block)
        return KvRead(*packed, to_16_bits(k).to(k.dtype), to_16_bits(v).to(v.dtype))

    def attended(self, call: Attention) -> None:
        """Nothing to do."""


class GradientReader:
    """K and V as they are, split so that the packed part has a gradient of its own.

    After a backward pass ``k[layer]`` and ``v[layer]`` hold the values and ``grad(layer)`` the gradients of what only
    those queries read that come after the token's block has left the window.
    """

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self._zero: dict[int, tuple[Tensor, Tensor]] = {}

    def read(self, layer: int, k: Tensor, v: Tensor) -> KvRead:
        """The packed part gets a zero of its own added, which is what the gradient is taken of."""
        self.k[layer], self.v[layer] = k.detach(), v.detach()
        zero = (
            torch.zeros_like(self.k[layer]).requires_grad_(),
            torch.zeros_like(self.v[layer]).requires_grad_(),
        )
        self._zero[layer] = zero
        return KvRead(k + zero[0], v + zero[1], k, v)

    def gradients(self, layer: int) -> tuple[Tensor, Tensor]:
        """Gradients of packed K and V, (B, H, T, D), since the last call of `clear`."""
        k, v = self._zero[layer]
        return (torch.zeros_like(k) if k.grad is None else k.grad), (
            torch.zeros_like(v) if v.grad is None else v.grad
        )

    def clear(self) -> None:
        """Forget the gradients, not the values."""
        for pair in self._zero.values():
            for zero in pair:
                zero.grad = None

    def attended(self, call: Attention) -> None:
        """Nothing to do."""


class OutputReader:
    """K and V as they are; after a backward pass the gradient of every attention layer's output."""

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self._zero: dict[int, Tensor] = {}

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        """As they are."""

    def attended(self, call: Attention) -> Tensor:
        """A zero of its own is added, which is what the gradient is taken of."""
        self._zero[call.layer] = torch.zeros_like(call.output).requires_grad_()
        return call.output + self._zero[call.layer]

    def gradient(self, layer: int) -> Tensor:
        """Of the output, (B, T, heads, D), since the last call of `clear`."""
        grad = self._zero[layer].grad
        return torch.zeros_like(self._zero[layer]) if grad is None else grad

    def clear(self) -> None:
        """Forget the gradients, not the values."""
        for zero in self._zero.values():
            zero.grad = None
