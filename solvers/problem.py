"""The allocation problem: one format per unit, least damage, within the bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from bitatlas.analysis.schema import (
    SMALL_MATTERS,
    Format,
    ModelIndex,
    SensitivityTable,
    TieGroup,
    UserError,
    parse_format,
)
from bitatlas.solvers.classes import Classes, merge_ties, tie_labels
from bitatlas.solvers.impute import impute_unknown

__all__ = ["Problem", "SideBudget"]


@dataclass(frozen=True, eq=False)
class SideBudget:
    """A second linear limit: latency, active bytes per token, BOPs, or the bytes of a group of units.

    Attributes:
        name: for messages ("latency in microseconds").
        cost: (U, F) float64, what a unit costs in a format; 0 for units it does not concern.
        limit: the sum over the units may not exceed this.
        option, unit: how the user writes it, and what one of it is, so that advice can be typed (``--bops``, 1e9).
    """

    name: str
    cost: np.ndarray
    limit: float
    option: str = ""
    unit: float = 1.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a solver may look at. Make one with `build` (from a table) or `of` (from arrays).

    Attributes:
        units: (U,) keys; formats: (F,) names.
        damage: (U, F) float64; NaN or inf = not allowed there. All NaN = no metric was given.
        bytes: (U, F) int64 payload bytes.
        limit_bytes: for the units' payload; kept tensors are already taken off.
        allowed: (U, F) bool, with pins applied (a pinned unit has one format left).
        ties: units that must share a format. pins: unit -> format as the user gave them.
        params: (U,) int64 weights; layers: (U,) int; roles: (U,) names: for the hand mixes.
        shapes: (U, 2) int64 rows and columns, or None; used to say which other format would fit.
        kept_bytes: bytes outside the units, for messages only.
        imputed: (U,) bool, damage was unknown and is an estimate (see `solvers.impute`).
        metric: name of the damage.
        side: further linear limits.
        interaction: (S, U, F) float32 projections a_s[u, b], or None; see `quadratic`.
        interaction_scale: 1 / (2 T), so that scale * mean_s a**2 is a damage.
        shrinkage: weight of the cross-unit terms, 0 (additive) to 1 (as measured).
        experts: (U,) int expert number, -1 for units that are no expert.
        engine: name of the engine that it is solved under, for messages. engine_pins: units of ``pins`` that it pins, not the user.
        more_formats: name of a format -> (U,) int64 bytes in the engine and (U,) bool where it takes it; None = our own bytes.
        score: (U,) float64 importance, larger = more, NaN = unknown; or None. See `with_score`.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    damage: np.ndarray
    bytes: np.ndarray
    limit_bytes: int
    allowed: np.ndarray
    params: np.ndarray
    layers: np.ndarray
    roles: tuple[str, ...]
    experts: np.ndarray
    ties: tuple[TieGroup, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    shapes: np.ndarray | None = None
    kept_bytes: int = 0
    imputed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    metric: str = ""
    side: tuple[SideBudget, ...] = ()
    interaction: np.ndarray | None = None
    interaction_scale: float = 1.0
    shrinkage: float = 1.0
    score: np.ndarray | None = None
    engine: str = ""
    engine_pins: frozenset[str] = frozenset()
    more_formats: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None

    @classmethod
    def of(
        cls,
        damage: np.ndarray,
        bytes_table: np.ndarray,
        limit_bytes: int,
        *,
        units: Sequence[str] | None = None,
        formats: Sequence[str] | None = None,
        ties: Sequence[TieGroup] = (),
        pins: Mapping[str, str] | None = None,
        allowed: np.ndarray | None = None,
        params: np.ndarray | None = None,
        layers: np.ndarray | None = None,
        roles: Sequence[str] | None = None,
        experts: np.ndarray | None = None,
        shapes: np.ndarray | None = None,
        kept_bytes: int = 0,
        imputed: np.ndarray | None = None,
        metric: str = "",
        side: Sequence[SideBudget] = (),
        interaction: np.ndarray | None = None,
        interaction_scale: float = 1.0,
        shrinkage: float = 1.0,
    ) -> Problem:
        """A problem from arrays; what is left out gets a neutral value. Applies pins to ``allowed``.

        Raises:
            ValueError: shapes that do not go together.
            UserError: pins or ties that name unknown units or formats, contradict each other, or leave a
                unit with no format.
        """
        damage = np.asarray(damage, np.float64)
        bytes_table = np.asarray(bytes_table, np.int64)
        if damage.ndim != 2 or damage.shape != bytes_table.shape or 0 in damage.shape:
            raise ValueError(f"damage {damage.shape} and bytes {bytes_table.shape} must be one (U, F) shape")
        n, k = damage.shape
        names = tuple(units) if units is not None else tuple(f"unit{i}" for i in range(n))
        labels = tuple(formats) if formats is not None else tuple(f"f{j}" for j in range(k))
        if len(names) != n or len(labels) != k or (bytes_table < 0).any():
            raise ValueError(f"{len(names)} units, {len(labels)} formats for a {damage.shape} table")
        pins = dict(pins or {})
        measured = np.isfinite(damage)
        mask = measured.copy() if measured.any() else np.ones((n, k), bool)
        if allowed is not None:
            mask &= np.asarray(allowed, bool)
        side = tuple(
            replace(s, cost=np.asarray(s.cost, np.float64).reshape(n, k), limit=float(s.limit)) for s in side
        )
        mask = _apply_pins(names, labels, mask, pins, tie_labels(names, ties))
        return cls(
            units=names,
            formats=labels,
            damage=damage,
            bytes=bytes_table,
            limit_bytes=int(limit_bytes),
            allowed=mask,
            params=np.ones(n, np.int64) if params is None else np.asarray(params, np.int64),
            layers=np.zeros(n, np.int64) if layers is None else np.asarray(layers, np.int64),
            roles=("",) * n if roles is None else tuple(roles),
            experts=np.full(n, -1, np.int64) if experts is None else np.asarray(experts, np.int64),
            ties=tuple(ties),
            pins=pins,
            shapes=shapes,
            kept_bytes=int(kept_bytes),
            imputed=np.zeros(n, bool) if imputed is None else np.asarray(imputed, bool),
            metric=metric,
            side=side,
            interaction=interaction,
            interaction_scale=interaction_scale,
            shrinkage=shrinkage,
        )

    @classmethod
    def build(
        cls,
        index: ModelIndex,
        table: SensitivityTable | None,
        formats: Sequence[Format | str],
        limit_bytes: int,
        pins: Mapping[str, str] | None = None,
        ties: Sequence[TieGroup] = (),
        *,
        side: Sequence[SideBudget] = (),
        interaction: np.ndarray | None = None,
        interaction_scale: float = 1.0,
        shrinkage: float = 1.0,
    ) -> Problem:
        """The problem of one model, one metric and one budget.

        A pin may name a format outside ``formats``; only the pinned units may take it. Pass-through formats
        (``bf16``) store the weight as it is, so without a measured column their damage is 0. A unit
        that was never measured gets an estimate, flagged in ``imputed`` (`solvers.impute`).

        Args:
            table: None for solvers that need no damage.
            limit_bytes: for the units' payload (``budget.weights_bytes - index.kept_bytes``).
            interaction: (S, U, len(formats)) projections, in the order of ``formats``.

        Raises:
            UserError: a format that was not measured, a metric without formats, pins or ties that cannot be.
        """
        pins = dict(pins or {})
        wanted = [f if isinstance(f, Format) else parse_format(f) for f in formats]
        n_free = len(wanted)
        extra = [parse_format(f) for f in dict.fromkeys(pins.values())]
        wanted += [f for f in extra if f not in wanted]
        names = tuple(f.name for f in wanted)
        keys, n = index.unit_keys(), len(index.units)
        damage = np.full((n, len(names)), np.nan)
        imputed = np.zeros(n, bool)
        if table is not None:
            damage, imputed = _damage_of(index, table, wanted)
        allowed = np.ones(damage.shape, bool)
        labels = tie_labels(keys, ties)
        position = {key: i for i, key in enumerate(keys)}
        for j in range(n_free, len(names)):
            here = [labels[position[u]] for u, f in pins.items() if u in position and f == names[j]]
            allowed[:, j] = np.isin(labels, here)
        if interaction is not None and interaction.shape[2] < len(names):
            pad = len(names) - interaction.shape[2]
            interaction = np.pad(interaction, ((0, 0), (0, 0), (0, pad)))
        return cls.of(
            damage,
            index.bytes_table(wanted),
            limit_bytes,
            units=keys,
            formats=names,
            ties=ties,
            pins=pins,
            allowed=allowed,
            params=np.array([u.params for u in index.units], np.int64),
            layers=np.array([u.layer for u in index.units], np.int64),
            roles=[u.role for u in index.units],
            experts=np.array([u.expert for u in index.units], np.int64),
            shapes=np.array([(u.rows, u.cols) for u in index.units], np.int64).reshape(n, 2),
            kept_bytes=index.kept_bytes,
            imputed=imputed,
            metric=table.metric if table is not None else "",
            side=side,
            interaction=interaction,
            interaction_scale=interaction_scale,
            shrinkage=shrinkage,
        )

    @cached_property
    def classes(self) -> Classes:
        """Tied units merged into one row each: what the solvers work on."""
        return merge_ties(self.units, self.damage, self.bytes, self.allowed, self.ties)

    @cached_property
    def has_damage(self) -> bool:
        """Whether every allowed choice has a known damage."""
        return bool(np.isfinite(self.damage[self.allowed]).all())

    @property
    def min_bytes(self) -> int:
        """Payload of the smallest allocation that pins and ties allow."""
        return int(self.classes.smallest_bytes().sum())

    def with_limit(self, limit_bytes: int) -> Problem:
        """The same problem with another budget; merged ties are kept, not recomputed."""
        other = replace(self, limit_bytes=int(limit_bytes))
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("classes", "has_damage")})
        return other

    def with_score(self, table: SensitivityTable) -> Problem:
        """The same problem with its units ranked by a metric that does not depend on the format.

        Raises:
            ValueError: a metric that depends on it.
        """
        if table.damage.shape[1] != 1:
            raise ValueError(f"{table.metric} has {table.damage.shape[1]} formats, a score has none")
        of_unit = dict(zip(table.units, table.damage[:, 0].tolist()))
        score = np.array([of_unit.get(key, np.nan) for key in self.units])
        sign = -1.0 if table.metric in SMALL_MATTERS else 1.0
        return replace(self, score=sign * score, metric=table.metric)

    def payload(self, choice: np.ndarray) -> int:
        """Bytes of an allocation, choice (U,) of format indices."""
        return int(self.bytes[np.arange(len(self.units)), choice].sum())

    def objective(self, choice: np.ndarray) -> float:
        """Sum of the damages of an allocation, choice (U,)."""
        return float(self.damage[np.arange(len(self.units)), choice].sum())

    def quadratic(self, choice: np.ndarray) -> float:
        """Damage with cross-unit terms: sum_u damage + shrinkage * scale * mean_s[(sum_u a)^2 - sum_u a^2].

        With damage = scale * mean_s a^2 and shrinkage 1 this is (1/2T) mean_s (sum_u a_s[u, b_u])^2, the
        Fisher projection's second-order KL of the whole allocation. NaN without an interaction factor.
        """
        if self.interaction is None:
            return float("nan")
        a = self.interaction[:, np.arange(len(self.units)), choice].astype(np.float64)  # (S, U)
        cross = float(np.mean(a.sum(axis=1) ** 2 - (a**2).sum(axis=1)))
        return self.objective(choice) + self.shrinkage * self.interaction_scale * cross


def _damage_of(
    index: ModelIndex, table: SensitivityTable, wanted: list[Format]
) -> tuple[np.ndarray, np.ndarray]:
    """Damage (U, F) in the index's order, imputed where a unit was never measured, and the flags (U,)."""
    measurable = [f.name for f in wanted if f.kind != "float" or f.name in table.formats]
    if table.formats == ("-",):
        raise UserError(
            f"{table.metric} does not depend on the format, so it cannot choose one",
            fix="--solver threshold ranks units by it; others need a metric per format, `bitatlas metrics` lists them",
        )
    selected = table.select(measurable)
    row_of = {key: i for i, key in enumerate(selected.units)}
    damage = np.full((len(index.units), len(wanted)), np.nan)
    columns = [i for i, f in enumerate(wanted) if f.name in measurable]
    rows = np.array([row_of.get(u.key, -1) for u in index.units])
    known = rows >= 0
    damage[np.ix_(np.flatnonzero(known), np.array(columns, np.int64))] = selected.damage[rows[known]]
    imputed = np.zeros(len(index.units), bool)
    if columns:
        damage[:, columns], imputed = impute_unknown(index.units, damage[:, columns], table.metric)
    for i, f in enumerate(wanted):
        if f.name not in measurable:
            damage[:, i] = 0.0
    return damage, imputed


def _apply_pins(
    units: tuple[str, ...],
    formats: tuple[str, ...],
    allowed: np.ndarray,
    pins: Mapping[str, str],
    labels: np.ndarray,
) -> np.ndarray:
    """``allowed`` with pinned units (and those tied to them) left with their one format."""
    position = {key: i for i, key in enumerate(units)}
    pinned: dict[int, tuple[str, str]] = {}
    for unit, name in pins.items():
        if unit not in position:
            raise UserError(
                "a pin names a unit that the model does not have", found=repr(unit),
                fix="run `bitatlas scan MODEL` for the names",
            )  # fmt: skip
        if name not in formats:
            raise UserError(
                f"{unit} is pinned to an unknown format", found=f"{name!r}, known: {', '.join(formats)}"
            )
        label = int(labels[position[unit]])
        before = pinned.setdefault(label, (unit, name))
        if before[1] != name:
            raise UserError(
                "two pins contradict each other, because their units must share a format",
                found=f"{before[0]} = {before[1]}, {unit} = {name}",
                fix="pin both to one format, or choose a target that does not tie them",
            )
    out = allowed.copy()
    if pinned:
        column = np.full(len(units), -1)
        by_label = np.full(int(labels.max()) + 1, -1)
        for label, (_, name) in pinned.items():
            by_label[label] = formats.index(name)
        column = by_label[labels]
        rows = np.flatnonzero(column >= 0)
        out[rows] = False
        out[rows, column[rows]] = allowed[rows, column[rows]]
    joint = np.ones((int(labels.max()) + 1, allowed.shape[1]), bool)
    np.logical_and.at(joint, labels, out)
    stuck = np.flatnonzero(np.logical_not(joint.any(axis=1))[labels])
    if stuck.size:
        i = int(stuck[0])
        label = int(labels[i])
        if label in pinned:
            raise UserError(
                f"{pinned[label][0]} is pinned to {pinned[label][1]}, whose damage is unknown there",
                found=f"no finite damage for {units[i]}", fix=f"measure {pinned[label][1]} first, or drop the pin",
            )  # fmt: skip
        tied = int((labels == label).sum()) > 1
        raise UserError(
            "a unit has no format left to choose" if not tied else "units that must share a format have none in common",
            found=f"{stuck.size} units, such as {units[i]}", fix="allow or measure more formats",
        )  # fmt: skip
    return out & joint[labels]
