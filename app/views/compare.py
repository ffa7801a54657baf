"""Compare: what changes when one allocation becomes another. Two choices in, a frozen view out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitatlas.analysis.schema import ModelIndex, SensitivityTable, UserError, parse_format
from bitatlas.app.views.words import count, short_bytes

__all__ = ["CompareView", "RoleChange", "Side", "Stability", "UnitChange", "build_compare", "rival"]

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two allocations: what it is called, unit -> format, and its measured KL if it was verified."""

    label: str
    formats: Mapping[str, str]
    kl: float = float("nan")
    kl_stderr: float = float("nan")


@dataclass(frozen=True, slots=True)
class Stability:
    """How often A's units get their formats again when A is solved again on other damages.

    Attributes:
        kept: (U,) share of the times, NaN = unknown; None where it cannot be said.
        how: where the other damages come from (``30 times with ...``), or why it cannot be said.
        share: mean of ``kept`` over the units that are free to move.
    """

    kept: np.ndarray | None
    how: str
    share: float = float("nan")


@dataclass(frozen=True, slots=True)
class RoleChange:
    """One step of the waterfalls: units of a role that differ, extra bytes and extra predicted damage of B over A."""

    role: str
    units: int
    nbytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class UnitChange:
    """One unit that differs; ``kept`` is how often it gets A's format again (`Stability`), NaN = unknown."""

    unit: str
    layer: int
    role: str
    before: str
    after: str
    nbytes: int
    damage: float
    kept: float


@dataclass(frozen=True, slots=True)
class CompareView:
    """Everything the Compare page shows; differences are B minus A.

    Attributes:
        title, detail: the answer in words.
        rows: row labels of the map, top to bottom; columns: roles.
        bits: (rows, columns) mean difference of code bits weighted by weights, NaN where there is no unit.
        changed: (rows, columns) units that differ.
        roles: the waterfalls. units: those that differ, largest change of damage first, at most 200.
        nbytes: (A, B) payload bytes; damage: (A, B) predicted; kl: (A, B) measured or NaN.
        stable: how often a free unit of A gets its format again, NaN = unknown; stable_how: on which damages, or why unknown.
    """

    title: str
    detail: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    bits: np.ndarray
    changed: np.ndarray
    roles: tuple[RoleChange, ...]
    units: tuple[UnitChange, ...]
    labels: tuple[str, str]
    nbytes: tuple[int, int]
    damage: tuple[float, float]
    kl: tuple[float, float]
    metric: str
    unit: str
    stable: float
    stable_how: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the download."""
        data = asdict(self)
        data["bits"], data["changed"] = self.bits.tolist(), self.changed.tolist()
        return data


def rival(sizes: Sequence[int], kl: Sequence[float]) -> int:
    """Which allocation to hold against the first: of those as large, to 2 %, the one with the lowest measured KL; else the second.

    Args:
        sizes: bytes of each, two or more; kl: measured, NaN = not verified.
    """
    alike = [
        i for i in range(1, len(sizes)) if abs(sizes[i] - sizes[0]) <= 0.02 * sizes[0] and kl[i] == kl[i]
    ]
    return min(alike, key=lambda i: kl[i], default=1)


def build_compare(
    index: ModelIndex, a: Side, b: Side, table: SensitivityTable | None, unit: str = "", stability: Stability | None = None
) -> CompareView:  # fmt: skip
    """Compare two allocations of one model.

    Args:
        table: damages to account the difference with; None = bytes only. Formats it lacks have unknown damage.
        unit: of the damages. stability: of ``a``; None = not asked for.

    Raises:
        UserError: an allocation that does not name every unit.
    """
    keys = index.unit_keys()
    for side in (a, b):
        missing = [k for k in keys if k not in side.formats]
        if missing:
            raise UserError(f"{side.label} is not for this model", found=f"{len(missing)} units without a format, {missing[0]} first")  # fmt: skip
    names = tuple(dict.fromkeys([*(a.formats[k] for k in keys), *(b.formats[k] for k in keys)]))
    column = {n: j for j, n in enumerate(names)}
    one, other = (np.array([column[s.formats[k]] for k in keys]) for s in (a, b))
    rows = np.arange(len(keys))
    size = index.bytes_table([parse_format(n) for n in names])
    bits = np.array([parse_format(n).bits for n in names])
    damage = _damage(table, names, len(keys))
    differs = one != other
    more_bytes, more_damage = size[rows, other] - size[rows, one], damage[rows, other] - damage[rows, one]
    # A format without a measured damage is only unknown where it makes a difference.
    more_damage = np.where(differs, more_damage, 0.0)
    sums = tuple(int(size[rows, c].sum()) for c in (one, other))
    hurts = tuple(float(damage[rows, c].sum()) for c in (one, other))
    roles = []
    for role in dict.fromkeys(u.role for u in index.units):
        mask = np.array([u.role == role for u in index.units]) & differs
        if mask.any():
            roles.append(
                RoleChange(role, int(mask.sum()), int(more_bytes[mask].sum()), float(more_damage[mask].sum()))
            )
    layers, columns, mean, changed = _grid(index, (bits[other] - bits[one]).astype(float), differs)
    stable = stability or Stability(None, "")
    kept = np.full(len(keys), np.nan) if stable.kept is None else stable.kept
    view_units = _units(index, a, b, np.flatnonzero(differs), more_bytes, more_damage, kept)
    title, detail = _words(differs, sums, hurts, (a, b), table is not None, stable)
    return CompareView(
        title, detail, layers, columns, mean, changed, tuple(roles), view_units, (a.label, b.label), (sums[0], sums[1]),
        (hurts[0], hurts[1]), (a.kl, b.kl), table.metric if table else "", unit, stable.share, stable.how,
    )  # fmt: skip


def _damage(table: SensitivityTable | None, names: Sequence[str], units: int) -> np.ndarray:
    """(U, F) damages of the named formats; NaN where the table has none, 0 for a format that changes nothing."""
    out = np.full((units, len(names)), np.nan)
    if table is not None:
        for j, name in enumerate(names):
            if name in table.formats:
                out[:, j] = table.damage[:, table.formats.index(name)]
    return out


def _grid(
    index: ModelIndex, change: np.ndarray, differs: np.ndarray
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, np.ndarray]:
    layers = sorted({u.layer for u in index.units})
    columns = tuple(dict.fromkeys(u.role for u in index.units))
    weight, total = np.zeros((len(layers), len(columns))), np.zeros((len(layers), len(columns)))
    changed = np.zeros(total.shape, np.int64)
    at = {layer: i for i, layer in enumerate(layers)}
    for u, delta, different in zip(index.units, change.tolist(), differs.tolist()):
        cell = at[u.layer], columns.index(u.role)
        weight[cell] += u.params
        total[cell] += u.params * delta
        changed[cell] += different
    with np.errstate(invalid="ignore"):
        mean = np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)
    return tuple("outside" if i < 0 else str(i) for i in layers), columns, mean, changed


def _units(
    index: ModelIndex,
    a: Side,
    b: Side,
    at: np.ndarray,
    nbytes: np.ndarray,
    damage: np.ndarray,
    kept: np.ndarray,
) -> tuple[UnitChange, ...]:
    order = at[np.lexsort((-np.abs(nbytes[at]), -np.nan_to_num(np.abs(damage[at]))))][:_SHOWN]
    return tuple(
        UnitChange(
            index.units[i].key, index.units[i].layer, index.units[i].role, a.formats[index.units[i].key],
            b.formats[index.units[i].key], int(nbytes[i]), float(damage[i]), float(kept[i]),
        )
        for i in order.tolist()
    )  # fmt: skip


def _words(
    differs: np.ndarray,
    sums: Sequence[int],
    hurts: Sequence[float],
    sides: tuple[Side, Side],
    judged: bool,
    stable: Stability,
) -> tuple[str, str]:
    if not differs.any():
        return "Both give every unit the same bits", f"{short_bytes(sums[0])} each."
    delta = sums[1] - sums[0]
    size = "the same size" if delta == 0 else f"{short_bytes(abs(delta))} {'more' if delta > 0 else 'less'}"
    words = [f"B takes {size}"]
    a, b = sides
    if np.isfinite(a.kl) and np.isfinite(b.kl):
        noise = np.hypot(np.nan_to_num(a.kl_stderr), np.nan_to_num(b.kl_stderr))
        sure = "" if abs(b.kl - a.kl) > 2 * noise else ", a difference within the noise"
        words.append(f"its measured KL is {b.kl:.3g} instead of {a.kl:.3g} nats per token{sure}")
    elif judged and np.isfinite(hurts).all() and hurts[0] > 0:
        words.append(f"its predicted damage is {hurts[1] / hurts[0]:.2f} times A's")
    detail = f"{int(differs.sum())} of {count(len(differs), 'unit')} differ."
    if np.isfinite(stable.share):
        detail += f" Solved again {stable.how}, a unit gets A's bits {stable.share:.0%} of the time."
    elif stable.how:
        detail += f" How stable A is cannot be said: {stable.how}."
    return " and ".join(words), detail
