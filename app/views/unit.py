"""Why is this matrix sensitive? One unit: damage against bits, its rank, its siblings, every value known about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import NO_FORMAT, UserError, parse_format
from bitatlas.app.studies import Study
from bitatlas.app.views.words import count, metric_unit, params

__all__ = ["Evidence", "UnitView", "build", "find_unit", "middle_format", "neighbour", "worst"]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the weight itself says.

    Attributes:
        counts (B,), edges (B + 1,): histogram of the weights.
        eigenvalues: of W^T W, ascending; alpha, sigma, xmin, tail: the power law fitted to their tail (NaN = none).
        kurtosis: excess kurtosis of the weights; outliers: share beyond 6 standard deviations.
    """

    counts: np.ndarray
    edges: np.ndarray
    eigenvalues: np.ndarray
    alpha: float
    sigma: float
    xmin: float
    tail: int
    kurtosis: float
    outliers: float


@dataclass(frozen=True, slots=True, eq=False)
class UnitView:
    """The page's content.

    Attributes:
        unit: its id; key: its name; title: the answer; subtitle: shape, role, layer.
        metric, unit_name: of the curve, and the unit of its values; floor: noise floor.
        formats (F,) and bits (F,): effective bits per weight; damage, stderr (F,): of the unit.
        low, middle, high (F,): 10 %, 50 %, 90 % of the units of the same role; siblings: how many those are.
        rank: of the unit among all at the middle format, 1 = worst, 0 = unknown; of: how many are known.
        values: columns of the table of everything known: metric, format, value, stderr, samples, rank.
    """

    unit: int
    key: str
    title: str
    subtitle: str
    metric: str
    unit_name: str
    floor: float
    formats: tuple[str, ...]
    bits: np.ndarray
    damage: np.ndarray
    stderr: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray
    siblings: int
    rank: int
    of: int
    values: Mapping[str, list[object]]


def find_unit(study: Study, text: str) -> int:
    """The id of the unit that a name, or else a regular expression, stands for; the first match.

    Raises:
        UserError: nothing matches, or the expression is not valid.
    """
    if text in study.keys:
        return study.keys.index(text)
    try:
        regex = re.compile(text)
    except re.error as e:
        raise UserError("the regular expression is not valid", found=f"{text!r}: {e}") from None
    found = next((i for i, key in enumerate(study.keys) if regex.search(key)), None)
    if found is None:
        raise UserError(f"no unit is called {text!r}", found=f"{len(study.keys)} units, such as {study.keys[0]}",
                        fix="copy a name from the Map's table")  # fmt: skip
    return found


def _order(study: Study, metric: str, format: str) -> np.ndarray:
    """Ids of the units whose value is known, worst first."""
    table = study.tables[metric]
    column = table.damage[:, table.formats.index(format)]
    order = np.argsort(np.where(np.isfinite(column), -column, np.inf), kind="stable")
    return order[: int(np.isfinite(column).sum())]


def middle_format(formats: tuple[str, ...]) -> str:
    """The format that ranks are told at: 3 bits where there are, else the middle one."""
    return next((f for f in formats if f.startswith("int3")), formats[len(formats) // 2])


def neighbour(study: Study, metric: str, unit: int, step: int) -> str:
    """Name of the unit ``step`` ranks away (wrapping round); of the worst one when this one has no rank."""
    order = _order(study, metric, middle_format(study.tables[metric].formats))
    at = np.flatnonzero(order == unit)
    return study.keys[int(order[(int(at[0]) + step) % len(order)])] if len(at) else study.keys[int(order[0])]


def worst(study: Study, metric: str) -> int:
    """Id of the unit that is hurt most; the first one when none is known."""
    order = _order(study, metric, middle_format(study.tables[metric].formats))
    return int(order[0]) if len(order) else 0


def build(study: Study, metric: str, unit: int) -> UnitView:
    """Everything about one unit; ``metric`` must depend on the format."""
    table, u, c = study.tables[metric], study.index.units[unit], study.columns
    order = _order(study, metric, middle_format(table.formats))
    at = np.flatnonzero(order == unit)
    rank = int(at[0]) + 1 if len(at) else 0
    same = c.role == c.role[unit]
    band = np.full((3, len(table.formats)), np.nan)
    for f in range(len(table.formats)):
        known = table.damage[same, f]
        known = known[np.isfinite(known)]
        if len(known):
            band[:, f] = np.quantile(known, [0.1, 0.5, 0.9])
    where = f"layer {u.layer}" if u.layer >= 0 else "outside the layers"
    expert = f", expert {u.expert}" if u.expert >= 0 else ""
    return UnitView(
        unit, u.key, _title(u.key, rank, len(order), middle_format(table.formats)),
        f"{u.role}, {where}{expert} · {u.rows:,} x {u.cols:,}, {params(u.params)} weights", metric, metric_unit(metric), table.floor,
        table.formats, np.array([parse_format(f).bits_per_weight(u.rows, u.cols) for f in table.formats]), table.damage[unit],
        table.stderr[unit], band[0], band[1], band[2], int(same.sum()) - 1, rank, len(order), _values(study, unit),
    )  # fmt: skip


def _title(key: str, rank: int, of: int, format: str) -> str:
    if not rank:
        return f"What {format} does to {key} is unknown"
    worst = "the worst of" if rank == 1 else f"number {rank:,} of"
    return f"{key} is {worst} {count(of, 'unit')} at {format}"


def _values(study: Study, unit: int) -> dict[str, list[object]]:
    out: dict[str, list[object]] = {
        n: [] for n in ("metric", "format", "value", "unit", "stderr", "samples", "rank")
    }
    for name, table in study.tables.items():
        for f, format in enumerate(table.formats):
            column = table.damage[:, f]
            value = column[unit]
            known = np.isfinite(value)
            row = (name, "" if format == NO_FORMAT else format, float(value), metric_unit(name), float(table.stderr[unit, f]),
                   int(table.count[unit, f]), int((column > value).sum()) + 1 if known else None)  # fmt: skip
            for key, cell in zip(out, row):
                out[key].append(cell)
    return out
