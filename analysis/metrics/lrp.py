"""Layer-wise relevance: how much of the predicted logit each unit's output carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.experts_hook import tap_experts
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, unknown_rows
from bitatlas.analysis.moe import routed_modules
from bitatlas.analysis.relevance import linear_rule, relevance_rules
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.analysis.sequences import sequence_steps, sequences_of, stacked
from bitatlas.analysis.unit_map import UnitHandle
from bitatlas.kernels.errors import UserError

__all__ = ["Lrp"]

_SHARES = {
    "q": 0.25, "k": 0.25, "v": 0.5, "gate": 0.5, "up": 0.5, "gate_up": 0.5,
    "shared_gate": 0.5, "shared_up": 0.5, "shared_gate_up": 0.5,
}  # fmt: skip
"""Of the relevance of a product's output, what a factor gets: half of attention x values, half of that times half for q and k."""
_UNKNOWN_ROLES = {"q_a", "q_b", "kv_a", "kv_b", "linear"}
_UNKNOWN_TYPES = ("gpt_neox", "llama4", "bloom", "falcon")


class Lrp(Metric):
    """Absolute relevance of a unit's outputs, per calibration token.

        lrp = (1/N) sum_tokens sum_features |R|,   lrp_net = (1/N) sum_tokens sum_features R,   R = z dL/dz

    LRP-QViT (Ranjan and Savakis 2024) takes the relevance that reaches a layer as its share of the bits; the rules are those
    of AttnLRP (arXiv 2402.05602): epsilon rule at linear maps (``lrp_epsilon``), norms and activations hand on what they
    get, products give half to each factor, the softmax has its ordinary gradient, routing weights are constants. What
    is propagated is the logit of the most likely token at every position, so ``lrp_net`` of the head is the mean top logit.
    A larger value asks for more bits. Experts that no token reached are unknown; ``count`` is tokens that
    passed through the unit; standard error over sequences.
    """

    NAME = "lrp"
    TITLE = "Layer-wise relevance"
    UNIT = "logit"
    SOURCE = "LRP-QViT (Ranjan and Savakis 2024), rules of AttnLRP (arXiv 2402.05602)"
    NEEDS = "gradients"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("lrp", "lrp_net")
    VERSION = 1
    SETTINGS = {"lrp_epsilon": 1e-6}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences.

        Raises:
            UserError: a part of the architecture has no rule.
        """
        odd = sorted({u.role for u in ctx.index.units} & _UNKNOWN_ROLES)
        if odd or ctx.index.model_type.startswith(_UNKNOWN_TYPES):
            raise UserError(
                "there is no relevance rule for a part of this architecture",
                found=f"{ctx.index.model_type}{', roles ' + ', '.join(odd) if odd else ''}",
                fix="measure `taylor` or `fisher`, which need no rules",
            )
        return sequence_steps(ctx, 512)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays absolute, net, tokens (B, U)."""
        _, tokens = sequences_of(ctx, key)
        shape = len(tokens), len(ctx.index.units)
        found = {name: np.zeros(shape) for name in ("absolute", "net", "tokens")}
        for s, one in enumerate(tokens):

            def record(i: int, relevance: Tensor, n: int, s: int = s, most: int = len(one)) -> None:
                found["absolute"][s, i] += float(relevance.abs().sum(dtype=torch.float64))
                found["net"][s, i] += float(relevance.sum(dtype=torch.float64))
                found["tokens"][s, i] = min(found["tokens"][s, i] + n, most)

            with _ruled(ctx, float(self.option(ctx, "lrp_epsilon")), record), torch.enable_grad():
                logits = ctx.loaded.logits(torch.from_numpy(one[None]))
                logits.max(-1).values.sum().backward()
        return StepResult(arrays=found)

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Sums over the sequences, per token."""
        tokens = stacked(parts, "tokens").sum(0).astype(int)
        rows: list[DamageRow] = []
        for name, array in zip(self.EMITS, ("absolute", "net")):
            values = stacked(parts, array) / ctx.seq_len  # (S, U)
            s = len(values)
            spread = values.std(0, ddof=1) / s**0.5 if s > 1 else np.full(values.shape[1], np.nan)
            for i, u in enumerate(ctx.index.units):
                if tokens[i]:
                    value = float(values[:, i].mean())
                    rows.append(DamageRow(name, u.key, NO_FORMAT, value, float(spread[i]), int(tokens[i])))
                else:
                    rows += unknown_rows(name, u.key, [NO_FORMAT])
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, and one backward through the activations alone."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
            backward_tokens=ctx.calibration_tokens,
        )


@contextmanager
def _ruled(ctx: MeasureContext, epsilon: float, record: Callable[[int, Tensor, int], None]) -> Iterator[None]:
    """All rules in place; ``record`` is told (unit, relevance of its output, tokens)."""
    model, index = ctx.loaded.model, ctx.index
    members: dict[int, list[tuple[int, UnitHandle]]] = {}
    for i, u in enumerate(index.units):
        if u.expert < 0:
            handle = ctx.loaded.handle(u.key)
            members.setdefault(id(handle.param), []).append((i, handle))

    def hook(found: list[tuple[int, UnitHandle]], share: Tensor | float) -> Any:
        def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            def told(relevance: Tensor) -> None:
                flat = relevance.reshape(-1, relevance.shape[-1])
                for i, handle in found:
                    record(i, _columns(flat, handle), len(flat))

            return linear_rule(out, epsilon, told, share)

        return after

    with ExitStack() as stack:
        stack.enter_context(relevance_rules(model, epsilon))
        for module in model.modules():
            found = members.get(id(getattr(module, "weight", None)))
            if found is None:
                continue
            if isinstance(module, nn.Embedding):
                # The graph begins here: no weight has a gradient.
                start = module.register_forward_hook(lambda _, args, out: out.detach().requires_grad_(True))
                stack.callback(start.remove)
            own = module.register_forward_hook(hook(found, _share(ctx, found[0][1].unit)))
            stack.callback(own.remove)
        if any(u.expert >= 0 for u in index.units):
            _rule_experts(ctx, stack, epsilon, record)
        yield


def _rule_experts(
    ctx: MeasureContext, stack: ExitStack, epsilon: float, record: Callable[[int, Tensor, int], None]
) -> None:
    position = {
        (u.layer, u.expert, u.role): (i, ctx.loaded.handle(u.key))
        for i, u in enumerate(ctx.index.units)
        if u.expert >= 0
    }

    def tap(layer: int) -> Callable[[int, str, Tensor, Tensor], Tensor]:
        def ruled(expert: int, place: str, x: Tensor, out: Tensor) -> Tensor:
            roles = ("gate", "up") if place == "in" else ("down",)
            found = [position[layer, expert, r] for r in roles if (layer, expert, r) in position]

            def told(relevance: Tensor) -> None:
                for i, handle in found:
                    record(i, _columns(relevance, handle), len(relevance))

            return linear_rule(out, epsilon, told, 0.5 if len(found) > 1 else 1.0)

        return ruled

    def constant_weights(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return *args[:2], args[2].detach()

    for layer, module in routed_modules(ctx.loaded).items():
        stack.callback(tap_experts(module, tap(layer)))
        stack.callback(module.register_forward_pre_hook(constant_weights).remove)


def _columns(relevance: Tensor, handle: UnitHandle) -> Tensor:
    """A unit's part of a fused output (n, .)."""
    if not handle.half:
        return relevance
    if handle.interleaved:
        return relevance[:, 0 if handle.half == "gate" else 1 :: 2]
    rows = handle.unit.rows
    return relevance[:, :rows] if handle.half == "gate" else relevance[:, rows:]


def _share(ctx: MeasureContext, unit: QuantUnit) -> Tensor | float:
    """What the unit's output gets of the product that it goes into; per feature for a fused qkv."""
    if unit.role != "qkv":
        gated = unit.role != "up" or any(
            u.role in ("gate", "gate_up") and u.layer == unit.layer for u in ctx.index.units
        )
        return _SHARES.get(unit.role, 1.0) if gated else 1.0
    kv = ctx.index.kv
    values = kv.heads[unit.layer] * kv.head_dim if kv is not None else unit.rows // 3
    return torch.cat([torch.full((unit.rows - values,), 0.25), torch.full((values,), 0.5)])
