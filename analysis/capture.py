"""Running the calibration text through the model for some of its units only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.prefix import decoder_blocks, held_bytes, replaced_blocks, resumes
from bitatlas.analysis.schema import QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["SHARED_INPUT", "Watch", "layer_groups", "watch_units"]

Watch = Callable[[str, Tensor, np.ndarray, Tensor | None], None]
"""(unit key, x (n, cols), sequence of each row (n,) int64, routing weight (n,) or None)."""

_STREAM_BYTES = 1 << 30

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

    The forward stops behind the last layer of ``units``. What that layer puts out is kept in the context, and a
    pass over later layers begins there; where it is missing (a resumed job), or a model's blocks share more than
    that, the pass begins at the start, with the same results.
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

    first = min(u.layer for u in units) if last >= 0 else ctx.index.n_layers
    stream = _Stream(ctx, first, last, batch_tokens)
    with torch.no_grad(), loaded.capture(callback, [*wanted, *behind]):
        for number, batch in enumerate(calibration.batches(batch_tokens)):
            before_batch()
            with stream.batch(number), suppress(_Reached):
                loaded.logits(torch.from_numpy(batch))
            offset += len(batch)
    stream.keep()


class _Stream:
    """What blocks put out, batch by batch: given to the next pass to begin with, taken from the one before."""

    def __init__(self, ctx: MeasureContext, first: int, last: int, batch_tokens: int) -> None:
        self._ctx, self._first, self._last = ctx, first, last
        self._name = f"stream {batch_tokens}"
        blocks = decoder_blocks(ctx.loaded.model, ctx.index.n_layers)
        self._blocks = list(blocks) if blocks is not None else []
        self._outputs: list[Any] = []
        kept: dict[int, list[Any]] = ctx.scratch.get(self._name, {})
        found = kept.get(first - 1)
        self._before = found if found is not None and self._resumable(first) else None

    def _resumable(self, layer: int) -> bool:
        """Whether this model may begin at a block (none shares K/V with an earlier one): tried once, on one sequence."""
        if "resumable" not in self._ctx.scratch:
            ids = torch.from_numpy(self._ctx.calibration.tokens[:1])
            seen: list[Any] = []
            hook = self._blocks[layer - 1].register_forward_hook(lambda _, __, out: seen.append(out))
            with torch.no_grad():
                whole = self._ctx.loaded.logits(ids)
                hook.remove()
                self._ctx.scratch["resumable"] = resumes(
                    self._ctx.loaded, ids, whole, self._blocks[:layer], (seen[0],) * layer
                )
        return bool(self._ctx.scratch["resumable"])

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """Around one batch: earlier blocks replaced where possible, the last block's output kept."""
        with ExitStack() as stack:
            if 0 <= self._last < len(self._blocks):
                watched = self._blocks[self._last]
                hook = watched.register_forward_hook(lambda _, __, out: self._outputs.append(out))
                stack.callback(hook.remove)
            if self._before is not None:
                outputs = (self._before[number],) * self._first
                stack.enter_context(replaced_blocks(self._blocks[: self._first], outputs))
            yield

    def keep(self) -> None:
        """Leaves the outputs to the next pass, unless they are too large; and the input, for the same layer again."""
        streams = {self._first - 1: self._before, self._last: self._outputs}
        self._ctx.scratch[self._name] = {
            layer: kept for layer, kept in streams.items() if kept and held_bytes(kept) <= _STREAM_BYTES
        }


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
