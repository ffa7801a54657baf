"""Which units get their gradients together: consecutive layers, as many as a memory limit allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bitatlas.analysis.schema import QuantUnit, UserError

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["ALL_UNITS", "default_bytes", "gradient_groups", "machine_bytes", "units_of_group"]

ALL_UNITS = "all units"
_OUTSIDE = "outside the layers"


def machine_bytes() -> int:
    """Memory of this machine, or of the control group that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text()))
    return total


def default_bytes(ctx: MeasureContext) -> int:
    """Half of what the device has left beside the model, at least 256 MiB.

    It is what the device has in all, not what is free at this moment, that counts: a job that goes on after a kill
    has to find the same steps again.
    """
    device_bytes = machine_bytes()
    if ctx.device.startswith("cuda"):
        import torch

        device_bytes = int(torch.cuda.get_device_properties(ctx.device).total_memory)
    return max((device_bytes - 4 * ctx.index.params) // 2, 1 << 28)


def gradient_groups(
    units: Sequence[QuantUnit],
    limit_bytes: int,
    unit_bytes: Callable[[QuantUnit], float],
    layers: int = 0,
) -> dict[str, tuple[QuantUnit, ...]]:
    """Group name -> units, in index order; one group named `ALL_UNITS` when everything fits.

    Args:
        limit_bytes: for what a group keeps at the same time. A layer is never cut: one that needs more is alone.
        unit_bytes: what one unit keeps.
        layers: that many layers in each group instead, 0 = as many as fit.

    Raises:
        UserError: a negative number of layers.
    """
    if layers < 0:
        raise UserError("a group needs at least one layer", found=f"group_layers={layers}")
    need: dict[int, float] = {}
    for u in units:
        need[u.layer] = need.get(u.layer, 0.0) + unit_bytes(u)
    inside = sorted(layer for layer in need if layer >= 0)
    if not inside or (not layers and sum(need.values()) <= limit_bytes) or (layers >= len(inside) > 0):
        return {ALL_UNITS: tuple(units)}
    spans: list[list[int]] = []
    for layer in inside:
        full = len(spans[-1]) >= layers if spans and layers else None
        if not spans or (full if full is not None else _bytes(need, spans[-1]) + need[layer] > limit_bytes):
            spans.append([])
        spans[-1].append(layer)
    names = [f"layers {s[0]}-{s[-1]}" for s in spans] + [_OUTSIDE] * any(u.layer < 0 for u in units)
    return {name: units_of_group(units, name) for name in names}


def units_of_group(units: Sequence[QuantUnit], name: str) -> tuple[QuantUnit, ...]:
    """The units of a group by its name alone, so that a step means the same wherever it runs."""
    if name == ALL_UNITS:
        return tuple(units)
    if name == _OUTSIDE:
        return tuple(u for u in units if u.layer < 0)
    first, last = (int(n) for n in name.removeprefix("layers ").split("-"))
    return tuple(u for u in units if first <= u.layer <= last)


def _bytes(need: dict[int, float], layers: Sequence[int]) -> float:
    return sum(need[layer] for layer in layers)
