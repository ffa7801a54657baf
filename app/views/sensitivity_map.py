"""Where in the model does it hurt? Cells of layer x role and, for a mixture of experts, layer x expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitatlas.analysis.schema import NO_FORMAT, SensitivityTable, UserError, parse_format
from bitatlas.app.selection import Selection
from bitatlas.app.studies import Study
from bitatlas.app.views.map_cells import MapPanel, Measured, expert_panel, role_panel
from bitatlas.app.views.regions import inside
from bitatlas.app.views.words import count, metric_unit

__all__ = ["ALL", "NORMALISE", "MapControls", "MapView", "build", "projections", "search"]

ALL = "all"
NORMALISE: dict[str, str] = {"as measured": "", "per MiB saved": " per MiB saved", "per M weights": " per M weights"}  # fmt: skip
"""Ways to show a damage: as it is, per MiB that the format saves over bf16, per million weights."""


@dataclass(frozen=True, slots=True)
class MapControls:
    """What the person chose; ``format`` is ignored for metrics that do not depend on it."""

    metric: str
    format: str
    projection: str = ALL
    normalise: str = "as measured"
    sort_experts: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class MapView:
    """The page's content.

    Attributes:
        title: the answer; subtitle: what it rests on.
        unit: of the values; log: on a log scale.
        panels: one for a dense model, roles and experts for a mixture.
        unit_cell: (U,) unit id -> cell id, -1 = not on the map; cells: how many there are.
        value, stderr: (U,) as shown.
        floor: noise floor of the metric as measured.
    """

    title: str
    subtitle: str
    unit: str
    log: bool
    panels: tuple[MapPanel, ...]
    unit_cell: np.ndarray
    cells: int
    value: np.ndarray
    stderr: np.ndarray
    floor: float

    def units_of(self, cells: Iterable[int]) -> Selection:
        """The units behind these cell ids."""
        wanted = np.fromiter(cells, np.int64)
        return Selection(tuple(np.flatnonzero(np.isin(self.unit_cell, wanted)).tolist()))

    def cells_in(self, event: Mapping[str, Any] | None) -> list[int]:
        """Ids of the cells in the boxes and lassos of a chart."""
        found = [
            p.cell[inside(event, p.cell_x, p.cell_y, str(i + 1) if i else "")]
            for i, p in enumerate(self.panels)
        ]
        return np.concatenate(found).tolist() if found else []

    def cells_of(self, selection: Selection) -> np.ndarray:
        """Ids of the cells that hold a selected unit, sorted."""
        ids = np.array([i for i in selection.ids if i < len(self.unit_cell)], np.int64)
        hit = np.unique(self.unit_cell[ids])
        return hit[hit >= 0]


def projections(study: Study) -> tuple[str, ...]:
    """Expert projections to choose from, ``all`` first; empty for a dense model."""
    c = study.columns
    names = tuple(c.roles[r] for r in dict.fromkeys(c.role[c.expert >= 0].tolist()))
    return (ALL, *names) if names else ()


def search(study: Study, pattern: str) -> Selection:
    """Units whose key matches the regular expression anywhere.

    Raises:
        UserError: the expression is not valid.
    """
    try:
        regex = re.compile(pattern)
    except re.error as e:
        raise UserError(
            "the regular expression is not valid",
            found=f"{pattern!r}: {e}",
            fix=r"for example layers\.0\.|down",
        ) from None
    return Selection(tuple(i for i, key in enumerate(study.keys) if regex.search(key)))


def build(study: Study, controls: MapControls) -> MapView:
    """The map of one metric at one format.

    Raises:
        UserError: the metric was not measured, or not for this format.
    """
    if controls.metric not in study.tables:
        raise UserError(
            f"{controls.metric} was not measured for {study.index.name}",
            found=f"measured: {', '.join(study.tables) or 'nothing'}",
            fix="measure it on the Run page",
        )
    table = study.tables[controls.metric]
    log = table.formats != (NO_FORMAT,)
    if log:
        table = table.select([controls.format])
    measured = _measured(study, table, controls, log)
    c = study.columns
    unit_cell = np.full(len(measured.raw), -1, np.int64)
    plain, routed = np.flatnonzero(c.expert < 0), np.flatnonzero(c.expert >= 0)
    moe = len(routed) > 0
    if moe and controls.projection != ALL:
        routed = routed[c.role[routed] == c.roles.index(controls.projection)]
    panels: list[MapPanel] = []
    layers = np.unique(c.layer)  # one axis for both panels, so that their rows line up
    if len(plain):
        panel, unit_cell[plain] = role_panel(c, plain, measured, 0, layers, layers_on_x=not moe)
        panels.append(panel)
    if len(routed):
        first = len(panels[0].cell) if panels else 0
        panel, unit_cell[routed] = expert_panel(
            c, routed, measured, first, layers, sort=controls.sort_experts
        )
        panels.append(panel)
    title, subtitle = _words(study, table, controls, measured)
    unit = metric_unit(controls.metric) + (NORMALISE[controls.normalise] if log else "")
    cells = sum(len(p.cell) for p in panels)
    return MapView(
        title,
        subtitle,
        unit,
        log,
        tuple(panels),
        unit_cell,
        cells,
        measured.value,
        measured.stderr,
        table.floor,
    )


def _measured(study: Study, table: SensitivityTable, controls: MapControls, log: bool) -> Measured:
    raw, stderr = table.damage[:, 0], table.stderr[:, 0]
    scale = np.ones(len(raw))
    if log and controls.normalise == "per M weights":
        scale = 1e6 / study.columns.params
    elif log and controls.normalise == "per MiB saved":
        both = study.index.bytes_table([parse_format("bf16"), parse_format(controls.format)])
        saved = np.maximum(both[:, 0] - both[:, 1], 1)
        scale = 2**20 / saved
    return Measured(raw, raw * scale, stderr * scale, table.floor, log)


def _words(study: Study, table: SensitivityTable, controls: MapControls, m: Measured) -> tuple[str, str]:
    known = np.isfinite(m.value)
    n, unknown = len(known), int((~known).sum())
    facts = [f"{known.sum():,} of {count(n, 'unit')} known"]
    if unknown and known.any():
        facts.append(f"{unknown:,} unknown")
    if not known.any():
        return f"Nothing is known yet about {controls.metric}", facts[0]
    worst = int(np.nanargmax(m.value))
    if not m.log:
        facts.append("the same for every format")
        return f"{study.keys[worst]} has the largest value, {m.value[worst]:.3g}", " · ".join(facts)
    below = int((m.raw[known] <= table.floor).sum())
    if table.floor > 0:
        facts.append(f"{below:,} at or below the noise floor of {table.floor:.1e}")
    else:
        # Without a floor a value is exact only when it has no standard error either.
        spread = np.isfinite(table.stderr).any()
        facts.append("an estimate: the hover gives its standard error" if spread else "exact, no noise floor")
    layer = study.columns.layer
    inside = known & (layer >= 0)
    share = np.bincount(layer[inside], np.maximum(m.raw[inside], 0), study.index.n_layers)
    total = share.sum()
    if total <= 0:
        return f"No layer is hurt measurably by {controls.format}", " · ".join(facts)
    falling = np.sort(share)[::-1].cumsum() / total
    half = int(np.searchsorted(falling, 0.5)) + 1
    rest = f"the worst unit is {study.keys[worst]}"
    verb = "carries" if half == 1 else "carry"
    return (
        f"{half} of {count(len(share), 'layer')} {verb} half the damage of {controls.format}",
        " · ".join([rest, *facts]),
    )
