"""How do the experts differ? Layer x expert of traffic, damage and spectra; and what is measured block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitatlas.analysis.schema import NO_FORMAT, UserError
from bitatlas.app.selection import Selection
from bitatlas.app.studies import Study
from bitatlas.app.views.regions import inside
from bitatlas.app.views.words import count, metric_unit

__all__ = [
    "ABSENT",
    "KNOWN",
    "UNKNOWN",
    "ZERO",
    "ExpertsView",
    "LayerProfile",
    "build",
    "layer_profile",
    "quantities",
]

ABSENT, KNOWN, UNKNOWN, ZERO = 0, 1, 2, 3
_ALPHAS = ("alpha_hill", "alphaq_alpha", "spectral_alpha")
_COUNT, _FREQUENCY, _WEIGHT = "routing_count", "routing_frequency", "routing_weight"


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsView:
    """Layer x expert of one quantity.

    Attributes:
        title: the answer; subtitle: what it rests on; unit: of the values; log: on a log scale.
        layers (L,): block numbers of the rows; experts: how many columns.
        value: (L, E) as it is; z: (L, E) float32 as drawn (log10 on a log scale), NaN unless known.
        state: (L, E) `ABSENT` (a layer with fewer experts), `KNOWN`, `UNKNOWN` (never reached, or not measured), `ZERO`
            (known to be zero, which a log scale cannot show).
        tokens: (L, E) tokens that reached the expert, NaN where routing was not measured.
        slot: (U,) layer row x experts + expert of every unit, -1 = no expert.
    """

    title: str
    subtitle: str
    unit: str
    log: bool
    layers: tuple[int, ...]
    experts: int
    value: np.ndarray
    z: np.ndarray
    state: np.ndarray
    tokens: np.ndarray
    slot: np.ndarray

    def units_of(self, slots: Iterable[int]) -> Selection:
        """The units of these experts, all projections of each."""
        wanted = np.fromiter(slots, np.int64)
        return Selection(tuple(np.flatnonzero(np.isin(self.slot, wanted)).tolist()))

    def slots_of(self, selection: Selection) -> np.ndarray:
        """Slots that hold a selected unit, sorted."""
        hit = np.unique(self.slot[np.array([i for i in selection.ids if i < len(self.slot)], np.int64)])
        return hit[hit >= 0]

    def slots_in(self, event: Mapping[str, Any] | None) -> list[int]:
        """Slots of the experts in the boxes and lassos of a chart."""
        row, column = np.nonzero(self.state != ABSENT)
        return (row * self.experts + column)[inside(event, column, row)].tolist()


@dataclass(frozen=True, slots=True, eq=False)
class LayerProfile:
    """Block scores by layer: name -> (L,) values, scaled to the largest of each; units by name; layers."""

    layers: tuple[int, ...]
    scores: Mapping[str, np.ndarray]
    largest: Mapping[str, float]


def quantities(study: Study) -> tuple[str, ...]:
    """What the map can show for this study; empty for a dense model."""
    if not (study.columns.expert >= 0).any():
        return ()
    out = []
    if _FREQUENCY in study.tables:
        out.append("frequency")
    if _WEIGHT in study.tables:
        out.append("routing weight")
    if study.damage_metrics:
        out.append("damage")
        if _FREQUENCY in study.tables:
            out.append("damage x frequency")
    if any(a in study.tables for a in _ALPHAS):
        out.append("alpha")
    return tuple(out)


def build(study: Study, quantity: str, metric: str = "", format: str = "") -> ExpertsView:
    """The map of one quantity; ``metric`` and ``format`` say which damage.

    An expert that no token reached has an unknown damage, whatever a table says; its frequency is a fact, zero.

    Raises:
        UserError: this was not measured.
    """
    if quantity not in quantities(study):
        raise UserError(f"the experts' {quantity} is not known here", found=f"known: {', '.join(quantities(study)) or 'nothing'}",
                        fix="measure routing, a damage, or alphaq on the Run page")  # fmt: skip
    c = study.columns
    routed = np.flatnonzero(c.expert >= 0)
    layers = np.unique(c.layer[routed])
    experts = int(c.expert[routed].max()) + 1
    slot = np.full(len(c.expert), -1, np.int64)
    slot[routed] = np.searchsorted(layers, c.layer[routed]) * experts + c.expert[routed]
    shape = len(layers), experts
    grid = _Grid(study, slot, routed, shape)
    tokens = grid.mean(_COUNT) if _COUNT in study.tables else np.full(shape, np.nan)
    present = np.bincount(slot[routed], minlength=shape[0] * shape[1]).reshape(shape) > 0
    value, unit = _value(study, grid, quantity, metric, format)
    log = quantity in ("damage", "damage x frequency", "frequency")
    if quantity.startswith("damage"):
        value = np.where(tokens == 0, np.nan, value)
    known = present & np.isfinite(value)
    zero = known & log & (value <= 0)
    state = np.where(~present, ABSENT, np.where(zero, ZERO, np.where(known, KNOWN, UNKNOWN))).astype(np.uint8)
    # Never reached is hatched on every map: its zero frequency is known, everything else about it is not.
    state[present & (tokens == 0)] = UNKNOWN
    z = np.full(shape, np.nan, np.float32)
    shown = state == KNOWN
    z[shown] = np.log10(value[shown]) if log else value[shown]
    title, subtitle = _words(quantity, value, state, tokens, layers)
    return ExpertsView(
        title, subtitle, unit, log, tuple(layers.tolist()), experts, value, z, state, tokens, slot
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    study: Study
    slot: np.ndarray
    routed: np.ndarray
    shape: tuple[int, int]

    def sum(self, column: np.ndarray) -> np.ndarray:
        """(L, E) sum over an expert's projections; NaN as soon as one is unknown."""
        cells = self.shape[0] * self.shape[1]
        return np.bincount(self.slot[self.routed], column[self.routed], cells).reshape(self.shape)

    def mean(self, name: str) -> np.ndarray:
        """(L, E) mean over an expert's projections of a value without formats."""
        size = np.maximum(self.sum(np.ones(len(self.slot))), 1)
        return self.sum(self.study.tables[name].damage[:, 0]) / size


def _value(study: Study, grid: _Grid, quantity: str, metric: str, format: str) -> tuple[np.ndarray, str]:
    if quantity == "frequency":
        return grid.mean(_FREQUENCY), metric_unit(_FREQUENCY)
    if quantity == "routing weight":
        return grid.mean(_WEIGHT), metric_unit(_WEIGHT)
    if quantity == "alpha":
        name = next(a for a in _ALPHAS if a in study.tables)
        return grid.mean(name), metric_unit(name)
    if metric not in study.damage_metrics:
        raise UserError(f"{metric or 'no metric'} was not measured by format", found=f"measured: {', '.join(study.damage_metrics)}")  # fmt: skip
    damage = grid.sum(study.tables[metric].select([format]).damage[:, 0])
    if quantity == "damage":
        return damage, metric_unit(metric)
    return damage * grid.mean(_FREQUENCY), f"{metric_unit(metric)} x share of tokens"


def _words(
    quantity: str, value: np.ndarray, state: np.ndarray, tokens: np.ndarray, layers: np.ndarray
) -> tuple[str, str]:
    present, known = state != ABSENT, (state == KNOWN) | (state == ZERO)
    never = int((tokens == 0).sum())
    facts = [f"{count(int(present.sum()), 'expert')} in {count(len(layers), 'layer')}"]
    unknown = int((state == UNKNOWN).sum())
    if never:
        facts.append(f"{never:,} never reached in calibration (hatched)")
    if unknown - never > 0:
        facts.append(f"{unknown - never:,} not measured (hatched)")
    if not known.any():
        return f"Nothing is known yet about the experts' {quantity}", " · ".join(facts)
    values = np.where(known, value, -np.inf)
    row, column = np.unravel_index(int(np.argmax(values)), values.shape)
    worst = f"layer {layers[row]}, expert {column}"
    if quantity in ("routing weight", "alpha"):
        return f"{worst} has the largest {quantity}, {value[row, column]:.3g}", " · ".join(facts)
    positive = np.sort(np.maximum(value[known], 0))[::-1]
    if positive.sum() <= 0:
        return f"No expert has any {quantity}", " · ".join(facts)
    half = int(np.searchsorted(positive.cumsum() / positive.sum(), 0.5)) + 1
    facts.insert(0, f"the largest is {worst}")
    thing = "half the traffic" if quantity == "frequency" else f"half the {quantity}"
    verb = "carries" if half == 1 else "carry"
    return f"{half:,} of {count(int(known.sum()), 'expert')} {verb} {thing}", " · ".join(facts)


def layer_profile(study: Study, metric: str = "", format: str = "") -> LayerProfile:
    """Scores that say one thing about a whole block, and the block's damage, by layer."""
    layer = study.columns.layer
    layers = np.unique(layer[layer >= 0])
    found: dict[str, np.ndarray] = {}
    if metric in study.damage_metrics and format in study.tables[metric].formats:
        column = np.maximum(study.tables[metric].select([format]).damage[:, 0], 0)
        found[f"{metric} of {format}"] = np.array([np.nansum(column[layer == n]) for n in layers])
    for name, table in study.tables.items():
        if table.formats != (NO_FORMAT,):
            continue
        rows = [table.damage[layer == n, 0] for n in layers]
        rows = [r[np.isfinite(r)] for r in rows]
        # One value for all units of a block is a score of the block.
        if any(len(r) > 1 for r in rows) and all(len(r) == 0 or np.ptp(r) == 0 for r in rows):
            found[name] = np.array([r[0] if len(r) else np.nan for r in rows])
    largest = {n: float(np.nanmax(np.abs(v))) for n, v in found.items() if np.isfinite(v).any()}
    scaled = {n: found[n] / largest[n] if largest[n] > 0 else found[n] for n in largest}
    return LayerProfile(tuple(layers.tolist()), scaled, largest)
