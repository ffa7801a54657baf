"""What was measured: provenance, rows, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import FORMATS

__all__ = [
    "KL_DAMAGES",
    "NO_FORMAT",
    "SMALL_MATTERS",
    "SOLVE_BY_DEFAULT",
    "SOLVE_WITH",
    "DamageRow",
    "Provenance",
    "SensitivityTable",
]

NO_FORMAT = "-"
"""The format column of a metric that does not depend on the format (routing counts, alpha)."""

SMALL_MATTERS = frozenset(
    {"zd", "zd_unit", "cka", "cca", "cca_output", "spectral_alpha", "alpha_hill", "alpha_hill_plain"}
)
"""Scores that do not depend on the format and are smaller where a unit is more important; of the others the larger ones are."""

SOLVE_BY_DEFAULT = ("fisher_anchored", "fisher_scaled", "fisher")
"""Damages that one measurement leaves: the first that is there is solved with when none is named."""

KL_DAMAGES = (*SOLVE_BY_DEFAULT, "fisher_projection", "kl_flip")
"""Damages that predict the KL itself, so that those of the cache can be added; the one to ask first comes first."""

SOLVE_WITH = (*KL_DAMAGES, "hawq_trace", "activation_error")
"""Damages to solve with, the one to ask first comes first."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a result was made from. Two results with equal provenance are the same result."""

    model_digest: str = ""
    model_name: str = ""
    calibration_digest: str = ""
    tokens: int = 0
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DamageRow:
    """One measured value; the row type of the store.

    Attributes:
        metric: name of the value (a run may emit several).
        unit: unit key.
        format: format name, or ``-`` when the value does not depend on the format.
        value: the estimate; NaN = unknown (no token reached the expert), never zero for unknown.
        stderr: its standard error; NaN when it has none (weights-only metrics are exact).
        count: samples behind it (sequences, tokens or probes; the metric says which).
        floor: noise floor in the same unit; 0 when exact.
    """

    metric: str
    unit: str
    format: str
    value: float
    stderr: float = float("nan")
    count: int = 0
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class SensitivityTable:
    """unit x format -> damage for one metric.

    Attributes:
        metric: its name.
        units: (U,) unit keys in model order.
        formats: (F,) format names; ``("-",)`` for format-free metrics.
        damage, stderr: (U, F) float64, NaN = unknown.
        count: (U, F) int64 samples.
        floor: noise floor, same unit as damage.
        run: key of the run that measured it.
    """

    metric: str
    units: tuple[str, ...]
    formats: tuple[str, ...]
    damage: np.ndarray
    stderr: np.ndarray
    count: np.ndarray
    floor: float = 0.0
    run: str = ""

    @classmethod
    def from_rows(cls, rows: Iterable[DamageRow], units: Sequence[str], run: str = "") -> SensitivityTable:
        """Table of one metric from its rows; units without a row are NaN, formats in `FORMATS` order.

        Raises:
            ValueError: no row, or rows of several metrics.
        """
        rows = list(rows)
        metrics = {r.metric for r in rows}
        if len(metrics) != 1:
            raise ValueError(f"rows of one metric are needed, got {sorted(metrics)}")
        order = {name: i for i, name in enumerate(FORMATS)}
        formats = tuple(sorted({r.format for r in rows}, key=lambda n: (order.get(n, -1), n)))
        position = {key: i for i, key in enumerate(units)}
        column = {name: i for i, name in enumerate(formats)}
        shape = (len(units), len(formats))
        damage, stderr = np.full(shape, np.nan), np.full(shape, np.nan)
        count = np.zeros(shape, np.int64)
        floor = 0.0
        for r in rows:
            if r.unit in position:
                at = position[r.unit], column[r.format]
                damage[at], stderr[at], count[at] = r.value, r.stderr, r.count
                floor = max(floor, r.floor)
        return cls(metrics.pop(), tuple(units), formats, damage, stderr, count, floor, run)

    def select(self, formats: Sequence[str]) -> SensitivityTable:
        """The same table with these columns, in this order.

        Raises:
            UserError: a format that was not measured.
        """
        missing = [f for f in formats if f not in self.formats]
        if missing:
            raise UserError(
                f"{self.metric} was not measured for {', '.join(missing)}",
                found=f"measured formats: {', '.join(self.formats)}",
                fix=f"bitatlas measure MODEL --metric {self.metric} --formats {','.join(formats)}",
            )
        cols = [self.formats.index(f) for f in formats]
        return SensitivityTable(
            self.metric, self.units, tuple(formats), self.damage[:, cols], self.stderr[:, cols],
            self.count[:, cols], self.floor, self.run,
        )  # fmt: skip
