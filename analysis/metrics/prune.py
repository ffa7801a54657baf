"""Pruning sensitivity: how far the model's predictions move when a unit loses its small weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.divergence import batch_noise, token_kl, top1_changed
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.prefix import PrefixRunner, Recording
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["Prune", "pruned"]

_STEP_TOKENS = 8192


class Prune(Metric):
    """KL(original || one unit pruned), and the share of positions whose most likely token changes.

    CPTQuant's PMPQ (Nanda et al. 2024): the accuracy lost when a layer is made sparse. The ``prune_share`` (half) of
    the unit's weights with the smallest magnitude become zero, everything else stays; accuracy against the model's own
    first choice is 1 - ``prune_top1``. On the first ``prune_sequences`` calibration sequences, the blocks before
    the unit computed once. ``count`` is sequences; standard error over them; the floor is the KL of another batch layout.
    """

    NAME = "prune"
    TITLE = "Pruning sensitivity"
    UNIT = "nats/token"
    SOURCE = "CPTQuant PMPQ (Nanda et al. 2024), accuracy drop under sparsity"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("prune", "prune_top1")
    VERSION = 1
    SETTINGS: ClassVar = {"prune_share": 0.5, "prune_sequences": 4}

    def __init__(self) -> None:
        self._state: tuple[MeasureContext, PrefixRunner, Recording, float] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of units of one layer, ``layer 3 units 0-7``."""
        share = float(self.option(ctx, "prune_share"))
        if not 0 < share < 1:
            raise UserError(
                "the share of pruned weights must lie between 0 and 1", found=f"prune_share={share}"
            )
        size = max(1, _STEP_TOKENS // self._tokens(ctx))
        return [
            f"layer {layer} units {i}-{min(i + size, len(units)) - 1}"
            for layer, units in _by_layer(ctx).items()
            for i in range(0, len(units), size)
        ]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """One run behind each unit's block, as rows."""
        words = key.split()
        first, last = (int(n) for n in words[3].split("-"))
        runner, original, noise = self._original(ctx)
        rows = []
        for unit in _by_layer(ctx)[int(words[1])][first : last + 1]:
            weight = pruned(ctx.weight(unit), float(self.option(ctx, "prune_share")))
            at = unit.layer if unit.layer >= 0 else ctx.index.n_layers if unit.role == "head" else 0
            with ctx.loaded.swapped({unit.key: weight}):
                logits = runner.resume(original, at)
            kl = token_kl(original.logits, logits).mean(1).numpy()  # (S,)
            changed = top1_changed(original.logits, logits).double().mean(1).numpy()
            for name, values, floor in zip(self.EMITS, (kl, changed), (noise, 0.0)):
                n = len(values)
                error = float(values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
                rows.append(DamageRow(name, unit.key, NO_FORMAT, float(values.mean()), error, n, floor))
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """A unit in layer l counts for the share of the blocks from l on."""
        layers = max(ctx.index.n_layers, 1)
        whole = sum(
            len(units) * (1.0 if layer < 0 else (layers - layer) / layers)
            for layer, units in _by_layer(ctx).items()
        )
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            # Never less than one look at the text, however few sequences are used.
            forward_tokens=max(ctx.calibration_tokens, int(self._tokens(ctx) * (1 + whole))),
        )

    def _tokens(self, ctx: MeasureContext) -> int:
        return ctx.seq_len * min(int(self.option(ctx, "prune_sequences")), ctx.sequences)

    def _original(self, ctx: MeasureContext) -> tuple[PrefixRunner, Recording, float]:
        if self._state is None or self._state[0] is not ctx:
            runner = PrefixRunner(ctx.loaded, ctx.index.n_layers)
            ids = torch.from_numpy(ctx.calibration.tokens[: int(self.option(ctx, "prune_sequences"))])
            original = runner.record(ids)
            noise = batch_noise(lambda alone: runner.record(alone).logits, ids, original.logits)
            self._state = ctx, runner, original, noise
        return self._state[1:]


def pruned(weight: Tensor, share: float) -> Tensor:
    """A copy with the ``share`` of its elements that are smallest in magnitude set to zero."""
    count = round(share * weight.numel())
    out = weight.clone()
    if count:
        smallest = np.argpartition(weight.abs().flatten().numpy(), count - 1)[:count]
        out.view(-1)[torch.from_numpy(smallest)] = 0.0
    return out


def _by_layer(ctx: MeasureContext) -> dict[int, list[QuantUnit]]:
    out: dict[int, list[QuantUnit]] = {}
    for unit in ctx.index.units:
        out.setdefault(unit.layer, []).append(unit)
    return out
