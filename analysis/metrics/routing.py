"""Routing: how often, and with what weight, the router sends tokens to each expert."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.kernels.errors import UserError

__all__ = ["Routing"]

_BATCH_TOKENS = 2048


class Routing(Metric):
    """Traffic of every routed expert, the same value for each of the expert's units.

        routing_count = tokens sent to the expert, routing_frequency = routing_count / N,
        routing_weight = mean routing weight of those tokens

    The two significance factors of MC-MoE (arXiv 2410.06270, eq. 5: frequency phi and weight w). A count of
    zero is a fact and stays zero; the mean weight of an expert that no token reached is unknown (NaN).
    The standard error is the spread over sequences. Not a damage: it says how far the others can be trusted.
    """

    NAME = "routing"
    TITLE = "Expert routing"
    UNIT = "tokens"
    SOURCE = "MC-MoE (arXiv 2410.06270), eq. 5: access frequency and routing weight"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("routing_count", "routing_frequency", "routing_weight")
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Batches of sequences.

        Raises:
            UserError: a dense model.
        """
        if not _expert_units(ctx):
            raise UserError(
                "this model has no routed experts",
                found=f"{ctx.index.name} ({ctx.index.model_type}), {ctx.index.n_layers} dense layers",
                fix="measure another metric; `bitatlas metrics` lists them",
            )
        size = max(1, _BATCH_TOKENS // ctx.seq_len)
        return [f"sequences {i}-{min(i + size, ctx.sequences) - 1}" for i in range(0, ctx.sequences, size)]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Counts of a batch: arrays count, weight, both (sequences, slots), slot = (layer, expert) in index order."""
        first, last = (int(n) for n in key.removeprefix("sequences ").split("-"))
        tokens = ctx.calibration.tokens[first : last + 1]  # (B, T)
        slots = _expert_units(ctx)
        # One unit stands for its expert: all see the same tokens.
        slot_of = {keys[0]: i for i, keys in enumerate(slots.values())}
        count = np.zeros((len(tokens), len(slots)), np.int64)
        total = np.zeros((len(tokens), len(slots)))

        def watch(unit: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
            sequence = (token.cpu() // tokens.shape[1]).numpy()
            np.add.at(count[:, slot_of[unit]], sequence, 1)
            if weight is not None:
                np.add.at(total[:, slot_of[unit]], sequence, weight.double().cpu().numpy())

        with torch.no_grad(), ctx.loaded.capture(watch, slot_of):
            ctx.loaded.logits(torch.from_numpy(tokens))
        return StepResult(arrays={"count": count, "weight": total})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Sums over all sequences, spread between them."""
        both = [parts[key] for key in self.plan(ctx)]
        count = np.concatenate([p["count"] for p in both])  # (S, slots)
        weight = np.concatenate([p["weight"] for p in both])
        sequences, length = ctx.calibration.tokens.shape
        rows = []
        for i, units in enumerate(_expert_units(ctx).values()):
            n = int(count[:, i].sum())
            spread = count[:, i].std(ddof=1) * sequences**0.5 if sequences > 1 else float("nan")
            mean, mean_spread = _ratio(weight[:, i], count[:, i])
            size = sequences * length
            values = ((n, spread, size), (n / size, spread / size, size), (mean, mean_spread, n))
            rows += [
                DamageRow(name, unit, NO_FORMAT, float(value), float(stderr), tokens)
                for unit in units
                for name, (value, stderr, tokens) in zip(self.EMITS, values)
            ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward over the calibration text."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
        )


def _expert_units(ctx: MeasureContext) -> dict[tuple[int, int], list[str]]:
    """(layer, routed expert) -> its unit keys."""
    found: dict[tuple[int, int], list[str]] = {}
    for u in ctx.index.units:
        if u.expert >= 0:
            found.setdefault((u.layer, u.expert), []).append(u.key)
    return found


def _ratio(total: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Sum / count over sequences, and the ratio estimator's standard error (delta method); NaN for no tokens."""
    n, s = int(count.sum()), len(count)
    if not n:
        return float("nan"), float("nan")
    mean = float(total.sum()) / n
    residual = total - mean * count
    return mean, float((residual @ residual * s / (s - 1)) ** 0.5) / n if s > 1 else float("nan")
