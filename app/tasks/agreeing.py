"""How far each measured metric can be trusted: its values against measured KL. Reads the store; loads no model."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix, load_probes
from bitatlas.analysis.gram import LogitGramMatrix, load_gram
from bitatlas.analysis.schema import (
    NO_FORMAT,
    ModelIndex,
    SensitivityTable,
    UserError,
    is_kv_metric,
    parse_format,
)
from bitatlas.analysis.trust import (
    AllocationTruths,
    Trust,
    between_runs,
    between_texts,
    decode_choice,
    judge,
    sum_of_choices,
)
from bitatlas.app.tasks.models import register
from bitatlas.app.views.words import metric_unit
from bitatlas.cache.paths import Home, write_output
from bitatlas.cache.runs import RunInfo
from bitatlas.cache.store import Store
from bitatlas.solvers.impute import impute_unknown

__all__ = ["agree", "trust_csv", "trust_rows"]

_FLIPS, _WHOLES = "kl_flip", "random_allocations"
_NATS = "nats/token"
_PAIRS = "+pairs"  # suffix of the rows that count cross-layer terms
_TEXTS = 4  # runs of one metric that are compared with each other


def agree(model: str | Path, *, out: str | Path | None = None) -> dict[str, Any]:
    """The trust table of a model, best metric first; written as CSV to ``out`` when named.

    Raises:
        UserError: no truth has been measured.
    """
    index = register(model)
    home = Home.default()
    rows = trust_rows(Store(home), index, home, costs=True)
    if out is not None:
        write_output(out, trust_csv(rows).encode())
    return {"model": index.name, "rows": [r.to_dict() for r in rows], "out": str(out) if out else ""}


def trust_csv(rows: list[Trust]) -> str:
    """The table as CSV: what is a mapping (formats, bands) becomes one column for each key."""
    flat = []
    for row in rows:
        data = row.to_dict()
        for name, prefix in (("flip_formats", "flip_"), ("bands", "band_"), ("band_counts", "band_count_")):
            data |= {prefix + key: value for key, value in data.pop(name).items()}
        data["other_texts"] = "; ".join(data["other_texts"])
        flat.append(data)
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in flat)
    return text.getvalue()


def trust_rows(store: Store, index: ModelIndex, home: Home, *, costs: bool = False) -> list[Trust]:
    """One row for every measured value, best first.

    Args:
        costs: look up what a run without a recorded cost must have taken; loads the metrics and so torch.

    Raises:
        UserError: neither single flips nor whole allocations have been measured.
    """
    runs = {r.run: r for r in store.runs(index.digest)}
    wholes, whole_run = _wholes(store, index, runs)
    by_metric: dict[str, list[RunInfo]] = {}
    for e in store.metrics_of(index.digest):  # newest first
        if is_kv_metric(e.metric):
            continue  # no flip of a weight and no allocation of weights can judge it
        by_metric.setdefault(e.metric, []).append(runs[e.run])
    flip_runs = by_metric.get(_FLIPS, [])
    source = _source(whole_run) if whole_run else _source(flip_runs[0]) if flip_runs else ""
    flip_run = next((r for r in flip_runs if _source(r) == source), flip_runs[0] if flip_runs else None)
    if flip_run is None and wholes is None:
        raise UserError(f"no truth has been measured for {index.name}",
                        found="neither single flips nor whole allocations", fix=f"bitatlas truth {index.path}")  # fmt: skip
    keys = index.unit_keys()
    flips = store.table(flip_run.run, _FLIPS, keys) if flip_run else None
    every = _every_flip(flip_run, index)
    rows: list[Trust] = []
    for name, candidates in by_metric.items():
        run = next((r for r in candidates if _source(r) != source), candidates[0])
        if run is flip_run and flips is not None and np.isnan(flips.damage).any():
            continue  # a sample of flips cannot be judged by itself
        table = store.table(run.run, name, keys)
        facts = _facts(run, name, index, costs)
        alike = [r for r in candidates if _size(r) == _size(run)][:_TEXTS]
        again = {r.run: store.table(r.run, name, keys) for r in alike if r is not run}
        others = {_source(r): again[r.run] for r in reversed(alike) if _source(r) != _source(run)}
        common: dict[str, Any] = {
            "run": run.run, "unit": facts.unit, "tokens": int(run.provenance.get("tokens") or 0),
            "forward_equivalents": facts.forwards, "calibration_runs": len(alike), "calibration_least": between_runs([table, *again.values()]), **between_texts(table, others),
            "same_text": bool(source) and _source(run) == source, **_ratios(facts.forwards, run, every, flip_run),
        }  # fmt: skip
        nats = facts.unit == _NATS
        single = None if run is flip_run else table
        predicted = _predicted(index, table, wholes) if facts.additive else None
        rows.append(judge(name, single, flips=flips, wholes=wholes, predicted=predicted, nats=nats, **common))
        if run.metric in ("fisher_projection", "logit_gram") and wholes is not None and predicted is not None:
            paired = _with_pairs(home, run, table, wholes)
            if paired is not None:
                rows.append(judge(name + _PAIRS, None, wholes=wholes, predicted=paired, nats=nats, **common))
    return sorted(rows, key=lambda r: (-np.nan_to_num(r.score, nan=-2.0), r.metric))


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a row needs to know about its metric; forwards: tokens forwards + 2 x backwards, NaN unknown."""

    unit: str
    additive: bool
    forwards: float


def _facts(run: RunInfo, name: str, index: ModelIndex, costs: bool) -> _Facts:
    unit = metric_unit(name)
    recorded = (run.provenance.get("settings") or {}).get("metric") or {}
    per_format = bool(run.formats)
    if recorded:
        forwards = float(recorded["forward_tokens"] + 2 * recorded["backward_tokens"])
        unit = recorded["unit"] if name == run.metric else unit
        return _Facts(unit, recorded["additive"] and per_format, forwards)
    if not costs:
        return _Facts(unit, per_format, float("nan"))
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.metrics import METRICS

    if run.metric not in METRICS:
        return _Facts(unit, per_format, float("nan"))
    metric = METRICS[run.metric]()
    settings = run.provenance.get("settings") or {}
    ctx = MeasureContext(index, [parse_format(f) for f in run.formats], settings=run.settings,
                         tokens=int(run.provenance.get("tokens") or 1), seq_len=int(settings.get("seq_len") or 2))  # fmt: skip
    cost = metric.cost(ctx)
    unit = metric.UNIT if name == run.metric else unit
    return _Facts(unit, metric.ADDITIVE and per_format, float(cost.forward_tokens + 2 * cost.backward_tokens))


def _size(run: RunInfo) -> tuple[Any, ...]:
    """What two runs have to share so that their texts and seeds alone can tell them apart."""
    told = run.provenance.get("settings") or {}
    return run.settings, run.formats, run.provenance.get("tokens"), told.get("seq_len"), told.get("mode")


def _source(run: RunInfo | None) -> str:
    return str((run.provenance.get("settings") or {}).get("source") or "") if run else ""


def _wholes(store: Store, index: ModelIndex, runs: Mapping[str, RunInfo]) -> tuple[AllocationTruths | None, RunInfo | None]:  # fmt: skip
    """All random allocations that were measured on the newest one's text with its formats."""
    found = [r for r in runs.values() if r.metric == _WHOLES and r.finished is not None]
    if not found:
        return None, None
    newest = found[0]
    choices, bits, kl, floor = [], [], [], 0.0
    for run in found:
        if (run.formats, run.calibration) == (newest.formats, newest.calibration):
            for c in store.candidates(run.run):
                extra = c.extra or {}
                choices.append(decode_choice(extra["choice"]))
                bits.append(extra["bits"])
                kl.append(c.objective)
                floor = max(floor, extra["floor"])
    choice = np.array(choices, np.intp).reshape(len(choices), len(index.units))
    return AllocationTruths(newest.formats, choice, np.array(bits), np.array(kl), floor), newest


def _predicted(
    index: ModelIndex, table: SensitivityTable, wholes: AllocationTruths | None
) -> np.ndarray | None:
    """(N,) additive prediction of the measured allocations; None where the metric cannot say one, NaN where it lacks a format."""
    if wholes is None or table.formats == (NO_FORMAT,):
        return None
    damage = np.full((len(table.units), len(wholes.formats)), np.nan)
    known = [f for f in wholes.formats if f in table.formats]
    if not known:
        return None
    try:
        filled, _ = impute_unknown(index.units, table.select(known).damage, table.metric)
    except UserError:  # no unit is known in all formats: a sample of flips, say
        return None
    damage[:, [wholes.formats.index(f) for f in known]] = filled
    for f, name in enumerate(wholes.formats):
        if name not in known and parse_format(name).kind == "float":
            damage[:, f] = 0.0
    return sum_of_choices(damage, wholes.choices)


def _with_pairs(home: Home, run: RunInfo, table: SensitivityTable, wholes: AllocationTruths) -> np.ndarray | None:  # fmt: skip
    """(N,) prediction with the cross-layer terms of the run; None when its part files are gone or lack a format."""
    load = load_gram if run.metric == "logit_gram" else load_probes
    try:
        probes: ProbeMatrix | LogitGramMatrix = load(home.runs(run.run))
    except UserError:
        return None
    if probes.units != table.units or not set(wholes.formats) <= set(probes.formats):
        return None
    column = np.array([probes.formats.index(f) for f in wholes.formats])
    return probes.score(column[wholes.choices], damage=table.select(probes.formats).damage)


def _every_flip(run: RunInfo | None, index: ModelIndex) -> int:
    """Forward tokens of measuring every unit in every format of the flips, each with a whole forward pass."""
    return len(index.units) * len(run.formats) * int(run.provenance.get("tokens") or 0) if run else 0


def _ratios(forwards: float, run: RunInfo, every: int, flips: RunInfo | None) -> dict[str, float]:
    if not every or flips is None:
        return {}
    per_flip_token = every / int(flips.provenance["tokens"])
    tokens = int(run.provenance.get("tokens") or 0)
    same = forwards / tokens / per_flip_token if tokens else (0.0 if forwards == 0 else float("nan"))
    return {"cost_ratio": forwards / every, "cost_ratio_same_text": same}
