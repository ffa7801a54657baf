"""Top-k flips: how often the router chooses other experts because something before it was quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.moe import chosen_mask, expert_slots, require_experts, watch_routing
from bitatlas.analysis.prefix import PrefixRunner, Recording
from bitatlas.analysis.schema import DamageRow, QuantUnit
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["TopkFlip"]

_STEP_TOKENS = 8192
_ALL = "everything in "


class TopkFlip(Metric):
    """Share of routing decisions whose set of chosen experts changes.

        topk_flip        = changed decisions / all decisions (tokens x layers with experts), one unit quantised
        topk_flip_before = the same for the decisions of the unit's own layer, all units of the model quantised

    Routing is discrete, outside every Taylor model of the damage, so the share says where those models may fail (EAQuant
    calls it routing consistency). The router itself stays as it is. A unit behind the last router, and one whose error
    moves no choice, has 0 as a fact. ``topk_flip_before`` stands at the experts and depends on what comes before their
    layer only. On the first ``topk_sequences`` sequences; ``count`` is tokens, standard error over sequences.
    Quantising everything at once takes the memory of a second copy of the weights.
    """

    NAME = "topk_flip"
    TITLE = "Top-k routing flips"
    UNIT = "share of decisions"
    SOURCE = "direct count; routing consistency as in EAQuant (2025)"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = True
    EMITS = ("topk_flip", "topk_flip_before")
    VERSION = 1
    SETTINGS: ClassVar = {"topk_sequences": 4}

    def __init__(self) -> None:
        self._state: tuple[MeasureContext, PrefixRunner, Recording, dict[int, Tensor]] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Everything in one format, for each, then chunks of flips, ``layer 3 flips 0-7``.

        Raises:
            UserError: a dense model, or no formats.
        """
        require_experts(ctx.index)
        if not ctx.formats:
            raise UserError("counting flips needs formats", fix="--formats int{2,3,4}-g64")
        size = max(1, _STEP_TOKENS // self._tokens(ctx))
        return [_ALL + f.name for f in ctx.formats] + [
            f"layer {layer} flips {i}-{min(i + size, len(pairs)) - 1}"
            for layer, pairs in self._pairs(ctx).items()
            for i in range(0, len(pairs), size)
        ]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Flips as rows."""
        if key.startswith(_ALL):
            return StepResult(self._everything(ctx, key.removeprefix(_ALL)))
        words = key.split()
        first, last = (int(n) for n in words[3].split("-"))
        runner, original, choices = self._original(ctx)
        rows = []
        for unit, f in self._pairs(ctx)[int(words[1])][first : last + 1]:
            at = unit.layer if unit.layer >= 0 else ctx.index.n_layers if unit.role == "head" else 0
            changed = np.zeros(len(original.ids))
            with ctx.loaded.swapped({unit.key: ctx.candidate(unit, ctx.formats[f])}), _choices(ctx) as now:
                runner.resume(original, at)
            for layer, mask in now.items():
                changed += _changed(mask, choices[layer], len(changed))
            rows.append(
                _row(self.NAME, unit.key, ctx.formats[f].name, changed / len(choices), original.ids.numel())
            )
        return StepResult(rows)

    def _everything(self, ctx: MeasureContext, name: str) -> list[DamageRow]:
        fmt = next(f for f in ctx.formats if f.name == name)
        _, original, choices = self._original(ctx)
        weights = {u.key: ctx.candidate(u, fmt) for u in ctx.index.units}
        with torch.no_grad(), ctx.loaded.swapped(weights), _choices(ctx) as now:
            ctx.loaded.logits(original.ids)
        share = {layer: _changed(now[layer], mask, len(original.ids)) for layer, mask in choices.items()}
        size = original.ids.numel()
        return [
            _row("topk_flip_before", u.key, name, share[layer], size)
            for (layer, _), units in expert_slots(ctx.index).items()
            if layer in share
            for u in units
        ]

    def cost(self, ctx: MeasureContext) -> Cost:
        """A flip in layer l counts for the share of the blocks from l on."""
        layers = max(ctx.index.n_layers, 1)
        pairs = self._pairs(ctx)
        whole = sum(len(p) * (1.0 if layer < 0 else (layers - layer) / layers) for layer, p in pairs.items())
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=max(
                ctx.calibration_tokens, int(self._tokens(ctx) * (1 + len(ctx.formats) + whole))
            ),
            quantised=2 * ctx.index.params * len(ctx.formats),
        )

    def _tokens(self, ctx: MeasureContext) -> int:
        return ctx.seq_len * min(int(self.option(ctx, "topk_sequences")), ctx.sequences)

    def _pairs(self, ctx: MeasureContext) -> dict[int, list[tuple[QuantUnit, int]]]:
        out: dict[int, list[tuple[QuantUnit, int]]] = {}
        for unit in ctx.index.units:
            out.setdefault(unit.layer, []).extend((unit, f) for f in range(len(ctx.formats)))
        return out

    def _original(self, ctx: MeasureContext) -> tuple[PrefixRunner, Recording, dict[int, Tensor]]:
        if self._state is None or self._state[0] is not ctx:
            runner = PrefixRunner(ctx.loaded, ctx.index.n_layers)
            ids = torch.from_numpy(ctx.calibration.tokens[: int(self.option(ctx, "topk_sequences"))])
            recording = runner.record(ids)
            with torch.no_grad(), _choices(ctx) as choices:
                ctx.loaded.logits(ids)
            self._state = ctx, runner, recording, dict(choices)
        return self._state[1:]


@contextmanager
def _choices(ctx: MeasureContext) -> Iterator[dict[int, Tensor]]:
    """Layer -> (tokens, experts) chosen in the forward inside the block."""
    found: dict[int, Tensor] = {}

    def watch(layer: int, x: Tensor, chosen: Tensor, weight: Tensor) -> None:
        found[layer] = chosen_mask(chosen, ctx.index.n_experts)

    with watch_routing(ctx.loaded, watch):
        yield found


def _changed(now: Tensor, before: Tensor, sequences: int) -> np.ndarray:
    """(sequences,) share of tokens whose set of experts is another one."""
    return (now != before).any(1).reshape(sequences, -1).double().mean(1).cpu().numpy()


def _row(metric: str, unit: str, fmt: str, by_sequence: np.ndarray, count: int) -> DamageRow:
    n = len(by_sequence)
    error = float(by_sequence.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return DamageRow(metric, unit, fmt, float(by_sequence.mean()), error, count)
