"""Running the calibration text through the model for some of its units only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.schema import QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["SHARED_INPUT", "layer_groups", "watch_units"]

Watch = Callable[[str, Tensor, np.ndarray, Tensor | None], None]
"""(unit key, x (n, cols), sequence of each row (n,) int64, routing weight (n,) or None)."""

SHARED_INPUT = {"k": "q", "v": "q", "up": "gate", "shared_up": "shared_gate"}
"""Role -> the role whose input it shares, as far as names tell; only estimates of memory and time hang on it."""


class _Reached(Exception):
    """The last layer of the group has been passed; the rest of the forward is not needed."""


def watch_units(
    ctx: MeasureContext,
    units: Sequence[QuantUnit],
    watch: Watch,
    batch_tokens: int,
    before_batch: Callable[[], None] = lambda: None,
) -> None:
    """One pass over all calibration sequences, no gradients; ``watch`` is told the inputs of ``units``.

    The forward stops behind the last layer of ``units``, so a group of early layers costs little.
    """
    wanted = {u.key for u in units}
    last = max(u.layer for u in units)
    # Head and embedding need it all.
    behind = (
        [u.key for u in ctx.index.units if u.layer == last + 1] if all(u.layer >= 0 for u in units) else []
    )
    calibration, loaded = ctx.calibration, ctx.loaded
    length = calibration.tokens.shape[1]
    offset = 0

    def callback(key: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        if key not in wanted:
            raise _Reached
        watch(key, x, (token.cpu() // length + offset).numpy(), weight)

    with torch.no_grad(), loaded.capture(callback, [*wanted, *behind]):
        for batch in calibration.batches(batch_tokens):
            before_batch()
            with suppress(_Reached):
                loaded.logits(torch.from_numpy(batch))
            offset += len(batch)


def layer_groups(
    units: Sequence[QuantUnit],
    max_bytes: int,
    input_bytes: Callable[[QuantUnit], int] = lambda u: 4 * u.cols**2,
) -> dict[str, tuple[QuantUnit, ...]]:
    """Consecutive units whose statistics fit into ``max_bytes``, of at most a quarter of the layers: step key -> units.

    ``input_bytes``: what a distinct input takes; by default its second moment in float32. A layer of many
    experts may take several groups; embedding and head make the last one.
    """
    inside = sorted((u for u in units if u.layer >= 0), key=lambda u: u.layer)
    most = max(1, -(-len({u.layer for u in inside}) // 4))
    groups: list[list[QuantUnit]] = []
    inputs: dict[tuple[int, int, str], int] = {}
    total = 0
    for u in inside:
        name = (u.layer, u.expert, SHARED_INPUT.get(u.role, u.role))
        new = 0 if name in inputs else input_bytes(u)
        if not groups or (new and total + new > max_bytes) or u.layer - groups[-1][0].layer >= most:
            groups.append([])
            inputs, total, new = {}, 0, input_bytes(u)
        groups[-1].append(u)
        inputs[name] = new
        total += new
    outside = [u for u in units if u.layer < 0]
    out = {f"{_span(g)} ({len(g)} units from {g[0].key})": tuple(g) for g in groups}
    return out | ({"outside the layers": tuple(outside)} if outside else {})


def _span(group: Sequence[QuantUnit]) -> str:
    first, last = group[0].layer, group[-1].layer
    return f"layer {first}" if first == last else f"layers {first}-{last}"
