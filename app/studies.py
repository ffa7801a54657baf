"""Studies as the pages see them: a model's index with every table, allocation and verification made for it.

The only door between the pages and the store. Everything here is read-only and free of Streamlit; the widget layer
caches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import (
    FORMATS,
    NO_FORMAT,
    KvLayout,
    KvTable,
    ModelIndex,
    SensitivityTable,
    UserError,
    is_kv_metric,
)
from bitatlas.cache.paths import Home
from bitatlas.cache.plans import PlanInfo
from bitatlas.cache.runs import RunInfo
from bitatlas.cache.store import Store

__all__ = [
    "MetricInfo",
    "Study",
    "StudyInfo",
    "UnitColumns",
    "freshness",
    "home",
    "kv_table",
    "list_studies",
    "load_study",
    "open_store",
    "stamp",
]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What has been measured of one metric: ``coverage`` is the share of unit x format cells with a known value."""

    name: str
    formats: tuple[str, ...]
    coverage: float
    run: str = ""
    finished: float = 0.0


@dataclass(frozen=True, slots=True)
class StudyInfo:
    """One line of the library.

    Attributes:
        digest, name, path, architecture: of the model.
        units, params, experts: its size (experts per MoE layer, 0 for dense).
        metrics: what has been measured.
        allocations, verifications: how many there are.
    """

    digest: str
    name: str
    path: str
    architecture: str
    units: int
    params: int
    experts: int
    metrics: tuple[MetricInfo, ...] = ()
    allocations: int = 0
    verifications: int = 0

    @property
    def label(self) -> str:
        """``name@digest8``: how a study is called in menus and in the URL."""
        return f"{self.name}@{self.digest[:8]}"


@dataclass(frozen=True, slots=True)
class UnitColumns:
    """The units as arrays, one entry a unit: layer, expert (-1 = none), role (index into ``roles``), weights."""

    layer: np.ndarray
    expert: np.ndarray
    role: np.ndarray
    params: np.ndarray
    roles: tuple[str, ...]

    @classmethod
    def of(cls, index: ModelIndex) -> UnitColumns:
        """From the index; roles in order of first appearance inside a block, embeddings and head last."""
        inside = dict.fromkeys(u.role for u in index.units if u.layer >= 0)
        roles = tuple(dict.fromkeys([*inside, *(u.role for u in index.units)]))
        code = {r: i for i, r in enumerate(roles)}
        return cls(
            np.array([u.layer for u in index.units], np.int32),
            np.array([u.expert for u in index.units], np.int32),
            np.array([code[u.role] for u in index.units], np.int16),
            np.array([u.params for u in index.units], np.int64),
            roles,
        )


@dataclass(frozen=True)
class Study:
    """Everything known about one model.

    ``kv``: tables of the KV cache's metrics by layer and pair. ``runs``: metric -> the run its table is from. ``allocations`` are the store's short records (`PlanInfo`), ``verifications`` its dicts; both newest first.
    """

    index: ModelIndex
    tables: Mapping[str, SensitivityTable] = field(default_factory=dict)
    runs: Mapping[str, RunInfo] = field(default_factory=dict)
    allocations: tuple[PlanInfo, ...] = ()
    verifications: tuple[dict[str, Any], ...] = ()
    kv: Mapping[str, KvTable] = field(default_factory=dict)

    @cached_property
    def columns(self) -> UnitColumns:
        """The units as arrays."""
        return UnitColumns.of(self.index)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Unit keys, position = unit id."""
        return self.index.unit_keys()

    @property
    def damage_metrics(self) -> tuple[str, ...]:
        """Metrics that depend on the format, so that bits can be bought with them."""
        return tuple(m for m, t in self.tables.items() if t.formats != (NO_FORMAT,))


def home() -> Home:
    """The data folder."""
    return Home.default()


def open_store() -> Store:
    """The store of the data folder."""
    return Store(home())


def list_studies(store: Store) -> list[StudyInfo]:
    """Every known model with what has been measured; measured ones first, then newest first. Reads no tables."""
    out = []
    for m in store.models():
        metrics = _newest(store, m["digest"], m["n_units"])
        out.append(
            StudyInfo(
                m["digest"], m["name"], m["path"], m["architecture"], m["n_units"], m["params"], m["n_experts"],
                tuple(metrics.values()), len(store.allocations(m["digest"])), len(store.verifications(m["digest"])),
            )
        )  # fmt: skip
    return sorted(out, key=lambda s: not s.metrics)


def _newest(store: Store, digest: str, units: int) -> dict[str, MetricInfo]:
    out: dict[str, MetricInfo] = {}
    for e in store.metrics_of(digest):
        if e.metric not in out:
            formats = max(len(e.formats), 1)
            # The KV cache's units are its own layers, all in one run.
            share = 1.0 if is_kv_metric(e.metric) else e.rows / max(units * formats, 1)
            out[e.metric] = MetricInfo(e.metric, e.formats, share, e.run, e.finished)
    return out


def stamp(store: Store, digest: str) -> tuple[str, ...]:
    """Changes whenever anything is added to the study: the key under which a loaded study may be kept."""
    runs = [f"{e.metric}:{e.run}" for e in store.metrics_of(digest)]
    runs += [r.run for r in store.runs(digest) if r.finished is not None and r.metric == "random_allocations"]
    plans = [str(a.id) for a in store.allocations(digest)]
    return (*runs, *plans, *(str(v["id"]) for v in store.verifications(digest)))


def load_study(store: Store, digest: str) -> Study:
    """The whole study; of every metric the newest finished run, with the formats of older runs like it.

    Raises:
        UserError: no such model.
    """
    index = store.model(digest)
    keys = index.unit_keys()
    runs = {r.run: r for r in store.runs(digest)}
    tables: dict[str, SensitivityTable] = {}
    kv: dict[str, KvTable] = {}
    for e in store.metrics_of(digest):  # newest first
        if is_kv_metric(e.metric):
            if e.metric not in kv and (table := kv_table(store, runs[e.run], e.metric)) is not None:
                kv[e.metric] = table
        elif e.metric not in tables:
            tables[e.metric] = store.table(e.run, e.metric, keys)
        elif _alike(runs[e.run], runs[tables[e.metric].run]) and not set(e.formats) <= set(
            tables[e.metric].formats
        ):
            tables[e.metric] = _with_more_formats(tables[e.metric], store.table(e.run, e.metric, keys))
    used = {m: t.run for m, t in tables.items()} | {m: t.run for m, t in kv.items()}
    return Study(
        index, tables, {m: runs[run] for m, run in used.items()}, tuple(store.allocations(digest)),
        tuple(store.verifications(digest)), kv,
    )  # fmt: skip


def kv_table(store: Store, run: RunInfo, metric: str) -> KvTable | None:
    """Damage of a KV run by layer and pair, None for values that are not about pairs."""
    default = KvLayout()
    layout = KvLayout(
        int(run.settings.get("kv_block", default.block)),
        int(run.settings.get("kv_residual", default.residual)),
    )
    try:
        return KvTable.from_rows(store.rows(run.run), metric, layout, run.run)
    except UserError:
        return None


def _alike(a: RunInfo, b: RunInfo) -> bool:
    """Were these runs made from the same text with the same settings, so that their columns may stand side by side?"""
    same = ("tokens", "seed")
    return (a.metric, a.calibration, a.settings) == (b.metric, b.calibration, b.settings) and all(
        a.provenance.get(k) == b.provenance.get(k) for k in same
    )


def _with_more_formats(table: SensitivityTable, older: SensitivityTable) -> SensitivityTable:
    """``table`` with the columns of ``older`` that it lacks, in the usual order of formats."""
    new = [f for f in older.formats if f not in table.formats]
    extra = older.select(new)
    order = [f for f in FORMATS if f in table.formats or f in new]
    both = SensitivityTable(
        table.metric, table.units, table.formats + extra.formats, np.hstack([table.damage, extra.damage]),
        np.hstack([table.stderr, extra.stderr]), np.hstack([table.count, extra.count]),
        max(table.floor, older.floor), table.run,
    )  # fmt: skip
    return both.select(order)


def freshness(info: StudyInfo) -> str:
    """``fresh``: the checkpoint on disk is the one measured; ``changed``; ``missing`` (or no longer readable)."""
    if not Path(info.path).exists():
        return "missing"
    try:
        return "fresh" if index_model(info.path).digest == info.digest else "changed"
    except UserError:
        return "missing"
