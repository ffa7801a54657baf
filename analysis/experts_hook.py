"""Fused experts made visible: an experts function for transformers that reports what each expert is given.

transformers 5 dispatches the forward of its fused experts through a registry. The function here is its eager
loop, expert by expert, numerically the same and differentiable, plus a report to whoever watches the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "IMPLEMENTATION",
    "ExpertTap",
    "ExpertWatcher",
    "tap_experts",
    "use_eager_experts",
    "watch_experts",
]

IMPLEMENTATION = "bitatlas_eager"

ExpertWatcher = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""(expert, x (n, hidden), intermediate (n, ffn), token_index (n,), routing_weight (n,)); experts without tokens
are not reported."""

ExpertTap = Callable[[int, str, Tensor, Tensor], Tensor]
"""(expert, ``in`` | ``out``, x (n, cols), product (n, rows)) -> the product to go on with. Gate and up are one product."""

_WATCHERS: dict[int, ExpertWatcher] = {}
_TAPS: dict[int, ExpertTap] = {}


def _untapped(expert: int, part: str, x: Tensor, y: Tensor) -> Tensor:
    return y


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Eager forward of a fused experts module: hidden_states (tokens, hidden), the others (tokens, k)."""
    out = torch.zeros_like(hidden_states)
    fused = self.gate_up_proj if self.has_gate else self.up_proj  # (E, 2 ffn, hidden), maybe transposed
    fused_bias = (
        getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias", None)
        if self.has_bias
        else None
    )
    down_bias = self.down_proj_bias if self.has_bias else None
    watcher, tap = _WATCHERS.get(id(self)), _TAPS.get(id(self), _untapped)
    by_slot = top_k_index.T
    for e in torch.unique(top_k_index).tolist():
        if not 0 <= e < self.down_proj.shape[0]:
            continue  # A router may mark "no expert" with an index beyond the last.
        # (k, tokens), not (tokens, k): the order of transformers' own loop.
        slot, token = torch.where(by_slot == e)
        x = hidden_states[token]
        h = _matmul(x, fused[e], None if fused_bias is None else fused_bias[e], self.is_transposed)
        h = tap(e, "in", x, h)
        h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
        if watcher is not None:
            watcher(e, x.detach(), h.detach(), token, top_k_weights[token, slot].detach())
        y = _matmul(h, self.down_proj[e], None if down_bias is None else down_bias[e], self.is_transposed)
        y = tap(e, "out", h, y)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * top_k_weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def use_eager_experts(model: nn.Module) -> bool:
    """Let every fused experts module of ``model`` run through this file. False when it has none."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    found = False
    for module in model.modules():
        if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
            config: Any = module.config
            config._experts_implementation = IMPLEMENTATION
            found = True
    return found


def watch_experts(module: nn.Module, watcher: ExpertWatcher) -> Callable[[], None]:
    """Report the experts of one module to ``watcher`` from now on; returns the function that ends it."""
    if not hasattr(module, "_apply_gate"):
        return module.register_forward_pre_hook(lambda m, args: _report_batched(m, args[0], watcher)).remove
    _WATCHERS[id(module)] = watcher

    def end() -> None:
        _WATCHERS.pop(id(module), None)

    return end


def tap_experts(module: Any, tap: ExpertTap) -> Callable[[], None]:
    """Show the products of one module's experts to ``tap``, graph and all; returns the function that ends it."""
    if not hasattr(module, "_apply_gate"):
        # An instance attribute shadows the class's forward.
        module.__dict__["forward"] = lambda states: _batched_forward(module, states, tap)
        return lambda: module.__dict__.pop("forward", None)
    _TAPS[id(module)] = tap

    def end() -> None:
        _TAPS.pop(id(module), None)

    return end


def _batched_forward(module: Any, hidden_states: Tensor, tap: ExpertTap) -> Tensor:
    """Llama 4's batched experts, expert by expert, for the tokens routed to each (the others are zero)."""
    states = hidden_states.view(module.gate_up_proj.shape[0], -1, hidden_states.shape[-1])
    out = torch.zeros_like(states)
    for e in range(states.shape[0]):
        token = states[e].detach().abs().amax(-1).nonzero().flatten()
        if token.numel():
            x = states[e][token]
            gate, up = tap(e, "in", x, x @ module.gate_up_proj[e]).chunk(2, dim=-1)
            h = up * module.act_fn(gate)
            y = tap(e, "out", h, h @ module.down_proj[e])
            out = out.index_put((torch.tensor(e, device=token.device), token), y)
    return out.view(-1, hidden_states.shape[-1])


def _report_batched(module: Any, hidden_states: Tensor, watcher: ExpertWatcher) -> None:
    """Llama 4: every expert gets all tokens, already scaled by their routing weight, zero where not routed."""
    with torch.no_grad():
        states = hidden_states.detach().view(module.gate_up_proj.shape[0], -1, hidden_states.shape[-1])
        for e in range(states.shape[0]):
            token = states[e].abs().amax(-1).nonzero().flatten()
            if token.numel():
                x = states[e][token]
                gate, up = (x @ module.gate_up_proj[e]).chunk(2, dim=-1)
                watcher(e, x, up * module.act_fn(gate), token, torch.ones_like(x[:, 0]))
