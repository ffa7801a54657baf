"""Gradients of the loss on the text itself, one sequence at a time, met with the units' weights and errors row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.schema import QuantUnit
from bitatlas.analysis.sequences import sequence_steps, sequences_of

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["gradient_dots", "gradient_steps", "row_offsets"]

_ERRORS_BYTES = 2 << 30
_STEPS = 8

OnRows = Callable[[int, int, Tensor], None]
"""(sequence of the step, position of the unit, (rows, F) inner products of each row's gradient and error, float64 on the CPU)."""


def gradient_steps(ctx: MeasureContext) -> list[str]:
    """At most eight chunks of sequences: what a step leaves behind is as large as all output rows."""
    return sequence_steps(ctx, -(-ctx.sequences // _STEPS) * ctx.seq_len)


def row_offsets(units: tuple[QuantUnit, ...]) -> np.ndarray:
    """(U + 1,) where the rows of each unit start when all are laid end to end."""
    return np.concatenate([[0], np.cumsum([u.rows for u in units])])


def gradient_dots(ctx: MeasureContext, key: str, on_rows: OnRows | None = None) -> dict[str, np.ndarray]:
    """One backward pass of the mean next-token loss for each sequence of a step.

    Args:
        on_rows: told every unit's products row by row, sequence after sequence; None takes what an earlier call of
            this process has found, where there is one.

    Returns:
        dots (B, U, F): <G, Q_f(W) - W>; own (B, U): <G, W>; tokens (B, U): tokens that passed through the unit.
        A gradient is dropped as soon as it has been used, so that one parameter's exists at a time.
    """
    made: dict[str, dict[str, np.ndarray]] = ctx.scratch.setdefault("loss gradients", {})
    if on_rows is None and key in made:
        return made[key]
    loaded, units = ctx.loaded, ctx.index.units
    _, tokens = sequences_of(ctx, key)
    members: dict[int, list[int]] = {}
    for i, u in enumerate(units):
        members.setdefault(id(loaded.handle(u.key).param), []).append(i)
    shape = len(tokens), len(units)
    out = {
        "dots": np.zeros((*shape, len(ctx.formats))),
        "own": np.zeros(shape),
        "tokens": np.full(shape, float(tokens.shape[1])),
    }
    experts = {u.key: i for i, u in enumerate(units) if u.expert >= 0}
    out["tokens"][:, list(experts.values())] = 0.0
    at = 0

    def consume(p: Tensor) -> None:
        for i in members[id(p)]:
            grad = loaded.handle(units[i].key).grad()
            if grad is not None:
                rows = torch.stack([(grad * e).sum(1, dtype=torch.float64) for e in _errors(ctx, i, grad)], 1)
                out["dots"][at, i] = rows.sum(0).cpu().numpy()
                weight = loaded.handle(units[i].key).get()
                out["own"][at, i] = float((grad * weight).sum(dtype=torch.float64))
                if on_rows is not None:
                    on_rows(at, i, rows.cpu())
        p.grad = None

    def count(unit: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        out["tokens"][at, experts[unit]] += len(token)

    with loaded.requires_grad(u.key for u in units) as parameters, torch.enable_grad():
        hooks = [p.register_post_accumulate_grad_hook(consume) for p in parameters]
        try:
            for at in range(len(tokens)):
                ids = torch.from_numpy(tokens[at : at + 1])
                with loaded.capture(count, experts):
                    logits = loaded.logits(ids)[0, :-1]  # (T - 1, V)
                torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device)).backward()
        finally:
            for hook in hooks:
                hook.remove()
    made[key] = out
    return out


def _errors(ctx: MeasureContext, i: int, like: Tensor) -> list[Tensor]:
    """Q_f(W) - W of a unit in every format; kept for the next sequence while there is room."""
    kept: dict[int, list[Tensor]] = ctx.scratch.setdefault("unit errors", {})
    if i in kept:
        return kept[i]
    unit = ctx.index.units[i]
    found = [(ctx.candidate(unit, fmt) - ctx.weight(unit)).to(like) for fmt in ctx.formats]
    used = ctx.scratch.get("unit errors bytes", 0) + sum(e.numel() * e.element_size() for e in found)
    if used <= _ERRORS_BYTES:
        kept[i] = found
        ctx.scratch["unit errors bytes"] = used
    return found
