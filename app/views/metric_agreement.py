"""Can the cheap metric be trusted? Two metrics unit by unit, all of them against each other, and each against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.agreement import rank, spearman
from bitatlas.analysis.schema import NO_FORMAT, SensitivityTable, UserError
from bitatlas.analysis.trust import Trust, badge
from bitatlas.app.studies import Study
from bitatlas.app.views.words import metric_unit

__all__ = [
    "ALL_ROLES",
    "BOTH",
    "NEITHER",
    "ONLY_X",
    "ONLY_Y",
    "MetricsControls",
    "MetricsView",
    "build",
    "matrix",
    "trust_badge",
    "trust_line",
]

ALL_ROLES = "all roles"
BOTH, ONLY_X, ONLY_Y, NEITHER = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class MetricsControls:
    """What the person chose: two metrics, the format to compare them at, a role, and how many units count as the top."""

    x: str
    y: str
    format: str
    role: str = ALL_ROLES
    k: int = 20


@dataclass(frozen=True, slots=True, eq=False)
class MetricsView:
    """The page's content.

    Attributes:
        title: the answer; subtitle: what it rests on.
        ids: (N,) unit ids known to both metrics; x, y: (N,) their values; top: (N,) which of the two lists of the k
            largest a unit stands in (`BOTH`, `ONLY_X`, `ONLY_Y`, `NEITHER`).
        x_unit, y_unit: units of the values; x_log, y_log: shown on a log scale.
        spearman: rank correlation of the two; overlap: share of the top k that they have in common.
        differ: rows of the units that only one of the two has in its top k, the largest difference of ranks first:
            unit id, rank in x, rank in y (1 = largest).
    """

    title: str
    subtitle: str
    ids: np.ndarray
    x: np.ndarray
    y: np.ndarray
    top: np.ndarray
    x_unit: str
    y_unit: str
    x_log: bool
    y_log: bool
    spearman: float
    overlap: float
    differ: np.ndarray


def values(table: SensitivityTable, format: str) -> np.ndarray | None:
    """(U,) of one metric at a format; its only column where it has no formats; None where it lacks the format."""
    if table.formats == (NO_FORMAT,):
        return table.damage[:, 0]
    return table.damage[:, table.formats.index(format)] if format in table.formats else None


def build(study: Study, controls: MetricsControls) -> MetricsView:
    """Two metrics unit by unit.

    Raises:
        UserError: one of them was not measured, or not for this format.
    """
    found = []
    for name in (controls.x, controls.y):
        got = values(study.tables[name], controls.format) if name in study.tables else None
        if got is None:
            raise UserError(f"{name} was not measured for {controls.format}",
                            found=f"measured: {', '.join(study.tables) or 'nothing'}", fix="choose another metric or format")  # fmt: skip
        found.append(got)
    a, b = found
    good = np.isfinite(a) & np.isfinite(b)
    columns = study.columns
    if controls.role != ALL_ROLES:
        good &= columns.role == columns.roles.index(controls.role)
    ids = np.flatnonzero(good)
    x, y = a[ids], b[ids]
    k = min(controls.k, len(ids) // 2)
    place = [np.argsort(np.argsort(-v, kind="stable"), kind="stable") + 1 for v in (x, y)]
    inside = [p <= k for p in place]
    top = np.where(
        inside[0] & inside[1], BOTH, np.where(inside[0], ONLY_X, np.where(inside[1], ONLY_Y, NEITHER))
    )
    rho = spearman(x, y)
    overlap = float((top == BOTH).sum() / k) if k else float("nan")
    other = np.flatnonzero((top == ONLY_X) | (top == ONLY_Y))
    other = other[np.argsort(-np.abs(place[0][other] - place[1][other]), kind="stable")]
    differ = np.stack([ids[other], place[0][other], place[1][other]], 1)
    logs = [
        study.tables[n].formats != (NO_FORMAT,) and bool((v > 0).all())
        for n, v in ((controls.x, x), (controls.y, y))
    ]
    return MetricsView(
        _title(controls, rho, overlap, k), f"{len(ids):,} of {len(study.keys):,} units known to both, at {controls.format}",
        ids, x, y, top.astype(np.int8), metric_unit(controls.x), metric_unit(controls.y), logs[0], logs[1], rho, overlap, differ,
    )  # fmt: skip


def _title(c: MetricsControls, rho: float, overlap: float, k: int) -> str:
    if not np.isfinite(rho):
        return f"{c.x} and {c.y} cannot be compared"
    word = "agree" if abs(rho) >= 0.9 else "agree roughly" if abs(rho) >= 0.7 else "agree little" if abs(rho) >= 0.4 else "disagree"  # fmt: skip
    tail = f", and share {overlap:.0%} of their top {k}" if k else ""
    return f"{c.x} and {c.y} {word}: rank correlation {rho:.2f}{tail}"


def matrix(study: Study, format: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and (M, M) rank correlations over the units that both know, of all metrics that can speak of this format."""
    found = {name: values(table, format) for name, table in study.tables.items()}
    known = {name: v for name, v in found.items() if v is not None and np.isfinite(v).sum() >= 3}
    names = tuple(known)
    out = np.full((len(names), len(names)), np.nan)
    # Ranks are made once for each pattern of unknown units; most metrics know the same ones.
    made: dict[tuple[str, bytes], np.ndarray] = {}
    masks = {n: np.isfinite(v) for n, v in known.items()}

    def ranks(name: str, mask: np.ndarray) -> np.ndarray:
        key = name, mask.tobytes()
        if key not in made:
            r = rank(known[name][mask])
            r -= r.mean()
            made[key] = r / max(float(np.sqrt(r @ r)), 1e-300)
        return made[key]

    for i, a in enumerate(names):
        for j in range(i + 1):
            mask = masks[a] & masks[names[j]]
            if mask.sum() >= 3:
                x, y = ranks(a, mask), ranks(names[j], mask)
                if x.any() and y.any():
                    out[i, j] = out[j, i] = float(x @ y)
    return names, out


def trust_badge(name: str, rows: Sequence[Trust]) -> str:
    """A metric's badge as Streamlit markup: words and colour."""
    row = next((r for r in rows if r.metric == name), None)
    word, colour = badge(row.score) if row is not None else ("not judged", "gray")
    return f":{colour}-badge[{word}]"


def trust_line(name: str, rows: Sequence[Trust]) -> str:
    """What the badge of a metric rests on, in a sentence."""
    row = next((r for r in rows if r.metric == name), None)
    if row is None or row.badge == "not judged":
        return "not judged: no measured flip or whole allocation speaks of it"
    facts = []
    if np.isfinite(row.band_least):
        facts.append(
            f"rank correlation {row.spearman:.2f} over {row.allocations} whole allocations, {row.band_least:.2f} in its worst half-bit band"
        )
    if np.isfinite(row.flip_within):
        facts.append(f"{row.flip_within:.2f} inside a format over {row.flips} single flips")
    if np.isfinite(row.ratio):
        facts.append(f"predicted / measured {row.ratio:.2f}")
    return "; ".join(facts)
