"""From units to the cells of a heat map: which cell a unit falls into, and what a cell is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitatlas.app.studies import UnitColumns

__all__ = ["ABSENT", "BELOW_FLOOR", "KNOWN", "UNKNOWN", "MapPanel", "Measured", "expert_panel", "role_panel"]

ABSENT, KNOWN, BELOW_FLOOR, UNKNOWN = 0, 1, 2, 3


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Per unit, shape (U,): ``raw`` damage as measured, ``value`` as shown (perhaps normalised), its ``stderr``.

    ``floor`` is in the unit of ``raw``; values at or below it are noise. ``log``: shown on a log scale.
    """

    raw: np.ndarray
    value: np.ndarray
    stderr: np.ndarray
    floor: float
    log: bool


@dataclass(frozen=True, slots=True, eq=False)
class MapPanel:
    """One heat map of Y x X squares, C of which are cells that hold units.

    Attributes:
        kind: ``roles`` or ``experts``.
        x, y: tick labels; x_title, y_title: axis titles.
        z: (Y, X) float32, the shown value (log10 of it on a log scale), NaN unless known.
        state: (Y, X) uint8: `ABSENT`, `KNOWN`, `BELOW_FLOOR` or `UNKNOWN`.
        cell: (C,) cell ids, unique over the panels of a view; cell_x, cell_y: (C,) their squares.
        value, stderr: (C,) shown value and its standard error; rank: (C,) 1 = largest, 0 = unknown.
        layer, expert: (C,) for the hover; -1 = outside the blocks, no expert.
        unit: (C,) the first unit of the cell, size: (C,) how many it holds.
    """

    kind: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    x_title: str
    y_title: str
    z: np.ndarray
    state: np.ndarray
    cell: np.ndarray
    cell_x: np.ndarray
    cell_y: np.ndarray
    value: np.ndarray
    stderr: np.ndarray
    rank: np.ndarray
    layer: np.ndarray
    expert: np.ndarray
    unit: np.ndarray
    size: np.ndarray


def role_panel(columns: UnitColumns, ids: np.ndarray, measured: Measured, first: int, layers: np.ndarray, *, layers_on_x: bool) -> tuple[MapPanel, np.ndarray]:  # fmt: skip
    """Layer x role over the units ``ids``; also returns the cell id of each of them.

    Args:
        first: id of the first cell; layers: the layers of the axis, sorted, -1 = outside the blocks.
    """
    layer_at = np.searchsorted(layers, columns.layer[ids])
    codes, role_at = np.unique(columns.role[ids], return_inverse=True)
    layer_names = _names(layers)
    role_names = tuple(columns.roles[c] for c in codes)
    if layers_on_x:
        names = (layer_names, role_names, "layer", "role", layer_at, role_at)
    else:
        names = (role_names, layer_names, "role", "layer", role_at, layer_at)
    return _panel("roles", columns, ids, measured, first, *names, sort=False)


def expert_panel(columns: UnitColumns, ids: np.ndarray, measured: Measured, first: int, layers: np.ndarray, *, sort: bool) -> tuple[MapPanel, np.ndarray]:  # fmt: skip
    """Layer x expert over the expert units ``ids``; with ``sort`` each layer's experts in order of falling value."""
    layer_at = np.searchsorted(layers, columns.layer[ids])
    n = int(columns.expert[ids].max()) + 1
    x_title = "experts of the layer, worst first" if sort else "expert"
    x = tuple(str(i) for i in range(n))
    return _panel("experts", columns, ids, measured, first, x, _names(layers), x_title, "layer", columns.expert[ids], layer_at, sort=sort)  # fmt: skip


def _names(layers: np.ndarray) -> tuple[str, ...]:
    return tuple("outside" if n < 0 else str(n) for n in layers)


def _panel(
    kind: str, columns: UnitColumns, ids: np.ndarray, m: Measured, first: int, x: tuple[str, ...], y: tuple[str, ...],
    x_title: str, y_title: str, x_at: np.ndarray, y_at: np.ndarray, *, sort: bool,
) -> tuple[MapPanel, np.ndarray]:  # fmt: skip
    width = len(x)
    square, start, at, size = np.unique(y_at * width + x_at, return_index=True, return_inverse=True, return_counts=True)  # fmt: skip
    count = len(square)
    # Sums let NaN through on purpose: a cell with one unknown unit is unknown.
    value = np.bincount(at, m.value[ids], count)
    raw = np.bincount(at, m.raw[ids], count)
    stderr = np.sqrt(np.bincount(at, m.stderr[ids] ** 2, count))
    known = np.isfinite(raw)
    below = known & m.log & (raw <= max(m.floor, 0.0) * size)
    cell_y, cell_x = np.divmod(square, width)
    if sort:
        order = np.lexsort((np.where(known, -value, np.inf), cell_y))
        row_start = np.searchsorted(cell_y[order], np.arange(len(y)))
        cell_x = cell_x.copy()
        cell_x[order] = np.arange(count) - row_start[cell_y[order]]
    z = np.full((len(y), width), np.nan, np.float32)
    state = np.zeros((len(y), width), np.uint8)
    state[cell_y, cell_x] = np.where(~known, UNKNOWN, np.where(below, BELOW_FLOOR, KNOWN))
    shown = known & ~below
    z[cell_y[shown], cell_x[shown]] = np.log10(value[shown]) if m.log else value[shown]
    rank = np.zeros(count, np.int32)
    rank[np.argsort(np.where(known, -value, np.inf), kind="stable")] = np.arange(1, count + 1)
    unit = ids[start]
    panel = MapPanel(
        kind, x, y, x_title, y_title, z, state, first + np.arange(count), cell_x, cell_y, value, stderr,
        np.where(known, rank, 0).astype(np.int32), columns.layer[unit],
        columns.expert[unit] if kind == "experts" else np.full(count, -1, np.int32), unit, size,
    )  # fmt: skip
    return panel, first + at
