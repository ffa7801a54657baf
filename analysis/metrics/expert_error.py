"""Expert reconstruction error: how far the MoE block's output moves when one expert is quantised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.analysis.capture import watch_units
from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.activation_error import relative_stderr
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, unknown_rows
from bitatlas.analysis.moe import require_experts, routed_modules, shrunk, watch_routing
from bitatlas.analysis.schema import DamageRow, QuantUnit

__all__ = ["ExpertError"]

_BATCH_TOKENS = 2048


class ExpertError(Metric):
    """Squared error of the routed output, per calibration token, for every expert and format.

        expert_error       = (1/N) sum_t r_t^2 ||E(x_t) - E'(x_t)||^2   one projection of the expert quantised
        expert_error_joint = the same with all its projections quantised
        expert_error_shrunk = (n/N) (n e + k m) / (n + k),   e = expert_error N / n,  m its mean over the layer's tokens
        expert_error_pmq   = 1000 phi w^1.5 sqrt(N expert_error_joint) / projections

    MC-MoE's PMQ (arXiv 2410.06270, eq. 6): r_t is the routing weight, the inputs are those of the original model, and
    an expert's rounding moves the block's output by its own output's error only. The shrunk form draws the error per routed
    token of an expert with few tokens n towards that of the layer's experts, k = ``shrink_tokens``. ``_pmq`` is the
    published cost as coded, with frequency phi and mean routing weight w normalised to sum 1 in the layer,
    divided evenly so that an expert's projections sum to it; it counts frequency twice. What is no routed
    expert, and experts that no token reached, are unknown. ``count`` = n; standard error over sequences.
    """

    NAME = "expert_error"
    TITLE = "Expert reconstruction error"
    UNIT = "squared activation per token"
    SOURCE = "MC-MoE PMQ (arXiv 2410.06270), eq. 6"
    NEEDS = "activations"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("expert_error", "expert_error_joint", "expert_error_shrunk", "expert_error_pmq")
    VERSION = 1
    SETTINGS = {"shrink_tokens": 64, "quantizer": "rtn"}
    LIMITS = {"shrink_tokens": (0, math.inf)}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per layer with experts.

        Raises:
            UserError: a dense model.
        """
        return [f"layer {layer}" for layer in sorted({layer for layer, _ in require_experts(ctx.index)})]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays of a layer's experts: single (E, P, F, 2), joint (E, F, 2) as (sum, stderr), tokens (E,), weight (E,)."""
        layer = int(key.split()[1])
        slots = {e: units for (at, e), units in require_experts(ctx.index).items() if at == layer}
        module = routed_modules(ctx.loaded)[layer]
        hidden, chosen, weight = _decisions(ctx, layer, [u for units in slots.values() for u in units])
        length = ctx.calibration.tokens.shape[1]
        most = max(len(units) for units in slots.values())
        single = np.full((len(slots), most, len(ctx.formats), 2), np.nan)
        joint = np.full((len(slots), len(ctx.formats), 2), np.nan)
        tokens, weights = np.zeros(len(slots), np.int64), np.zeros(len(slots))
        for i, (e, units) in enumerate(slots.items()):
            token, slot = torch.where(chosen == e)
            tokens[i] = len(token)
            if not len(token):
                continue
            route = weight[token, slot]
            weights[i] = float(route.sum(dtype=torch.float64))
            x = hidden[token]
            sequence = (token.cpu() // length).numpy()
            with torch.no_grad():
                original = _expert(module, e, x, route)
                for f, fmt in enumerate(ctx.formats):
                    changed = {u.key: ctx.candidate(u, fmt).to(ctx.loaded.handle(u.key).param) for u in units}
                    variants = [{u.key: changed[u.key]} for u in units] + [changed]
                    for p, variant in enumerate(variants):
                        with ctx.loaded.swapped(variant):
                            error = (_expert(module, e, x, route) - original).square().sum(1)  # (n,)
                        found = _sum_and_spread(error, sequence, len(ctx.calibration.tokens))
                        if p < len(units):
                            single[i, p, f] = found
                        else:
                            joint[i, f] = found
        return StepResult(arrays={"single": single, "joint": joint, "tokens": tokens, "weight": weights})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Per token, shrunk inside each layer, and the published cost."""
        slots = require_experts(ctx.index)
        names = [f.name for f in ctx.formats]
        rows = [
            r
            for u in ctx.index.units
            if u.expert < 0
            for m in self.EMITS
            for r in unknown_rows(m, u.key, names)
        ]
        for key in self.plan(ctx):
            layer = int(key.split()[1])
            members = [units for (at, _), units in slots.items() if at == layer]
            rows += self._layer(ctx, members, {k: parts[key][k] for k in ("single", "joint", "tokens", "weight")}, names)  # fmt: skip
        return rows

    def _layer(
        self, ctx: MeasureContext, members: Sequence[Sequence[QuantUnit]], part: dict[str, np.ndarray], names: list[str]
    ) -> list[DamageRow]:  # fmt: skip
        size, prior = ctx.calibration.size, float(self.option(ctx, "shrink_tokens"))
        tokens, known = part["tokens"], part["tokens"] > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            per_token = part["single"][..., 0] / tokens[:, None, None]  # (E, P, F)
            mean_weight = np.where(known, part["weight"] / tokens, 0.0)
        phi, w = tokens / max(tokens.sum(), 1), mean_weight / max(mean_weight.sum(), 1e-30)
        rows = []
        for i, units in enumerate(members):
            for p, u in enumerate(units):
                for f, name in enumerate(names):
                    n = int(tokens[i])
                    total, spread = part["single"][i, p, f]
                    both, both_spread = part["joint"][i, f]
                    drawn = shrunk(per_token[:, p, f], tokens, prior)[i] * n / size
                    cost = 1000 * phi[i] * w[i] ** 1.5 * both**0.5 / len(units)
                    values = (
                        (total / size, spread / size),
                        (both / size, both_spread / size),
                        (drawn, spread / size * n / (n + prior)),
                        (cost, cost * both_spread / (2 * both) if both > 0 else float("nan")),
                    )
                    rows += [
                        DamageRow(m, u.key, name, float(v) if n else float("nan"), float(e), n)
                        for m, (v, e) in zip(self.EMITS, values)
                    ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, then each expert on its own tokens once per projection and format, and once together."""
        slots = require_experts(ctx.index)
        experts = [u for units in slots.values() for u in units]
        variants = 1 + len(ctx.formats) * (1 + len(experts) / max(len(slots), 1))
        routed = ctx.calibration_tokens * ctx.index.top_k / max(ctx.index.n_experts, 1)
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
            flops=2.0 * routed * sum(u.params for u in experts) * variants,
            quantised=sum(u.params for u in experts) * len(ctx.formats),
        )


def _decisions(ctx: MeasureContext, layer: int, units: Sequence[QuantUnit]) -> tuple[Tensor, Tensor, Tensor]:
    """All calibration tokens at a layer's experts: hidden (N, d), chosen (N, k), weights (N, k)."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    batches = 0

    def begin() -> None:
        nonlocal batches
        batches += 1

    def watch(at: int, x: Tensor, chosen: Tensor, weight: Tensor) -> None:
        # Before the first batch the pass may try out on a sequence whether it can start at this layer.
        if at == layer and batches:
            found.append((x, chosen, weight))

    with watch_routing(ctx.loaded, watch):
        watch_units(ctx, units, lambda *_: None, _BATCH_TOKENS, before_batch=begin)
    hidden, chosen, weight = zip(*found)
    return torch.cat(hidden), torch.cat(chosen), torch.cat(weight)


def _expert(module: nn.Module, expert: int, x: Tensor, route: Tensor) -> Tensor:
    """Weighted output (n, d) of one expert, by the model's own forward."""
    alone = torch.full((len(x), 1), expert, device=x.device)
    out: Tensor = module(x, alone, route.unsqueeze(-1))
    return out.float()


def _sum_and_spread(error: Tensor, sequence: np.ndarray, sequences: int) -> tuple[float, float]:
    by_sequence = np.bincount(sequence, error.double().cpu().numpy(), sequences)
    total = float(by_sequence.sum())
    return total, total * relative_stderr(by_sequence)
