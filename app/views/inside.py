"""What a model is made of: one row a role."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import ModelIndex, parse_format
from bitatlas.app.views.words import count, params, short_bytes

__all__ = ["SHOWN", "InsideView", "build"]

SHOWN = ("bf16", "int8-g64", "int4-g64", "int3-g64", "int2-g64")
"""Formats whose sizes are shown."""


@dataclass(frozen=True, slots=True)
class InsideView:
    """``columns``: name -> one value a role."""

    title: str
    subtitle: str
    columns: dict[str, list[object]]


def build(index: ModelIndex) -> InsideView:
    """Roles of a model with units, shapes, weights and exact bytes."""
    groups: dict[str, list[int]] = {}
    for i, u in enumerate(index.units):
        groups.setdefault(f"{u.role} (experts)" if u.expert >= 0 else u.role, []).append(i)
    sizes = index.bytes_table([parse_format(f) for f in SHOWN])
    weights = np.array([u.params for u in index.units])
    columns: dict[str, list[object]] = {"role": list(groups)}
    columns["units"] = [len(ids) for ids in groups.values()]
    columns["shape"] = [_shapes(index, ids) for ids in groups.values()]
    columns["weights"] = [params(weights[ids].sum()) for ids in groups.values()]
    columns["share"] = [float(weights[ids].sum() / weights.sum()) for ids in groups.values()]
    for j, name in enumerate(SHOWN):
        columns[name] = [short_bytes(sizes[ids, j].sum()) for ids in groups.values()]
    total = dict(zip(SHOWN, sizes.sum(axis=0)))
    title = (
        f"{index.name}: {params(index.params)} weights in {count(len(index.units), 'unit')}, "
        f"{short_bytes(total['bf16'] + index.kept_bytes)} in bf16, {short_bytes(total['int4-g64'] + index.kept_bytes)} in int4-g64"
    )
    facts = [index.architecture, count(index.n_layers, "layer")]
    if index.n_experts:
        facts.append(f"{index.n_experts} experts a layer, {index.top_k} at a time")
    facts.append(f"{count(len(index.kept), 'tensor')} stay as they are ({short_bytes(index.kept_bytes)})")
    return InsideView(title, " · ".join([*facts, *index.notes]), columns)


def _shapes(index: ModelIndex, ids: list[int]) -> str:
    shapes = dict.fromkeys(f"{index.units[i].rows} x {index.units[i].cols}" for i in ids)
    first = next(iter(shapes))
    return first if len(shapes) == 1 else f"{first} and {len(shapes) - 1} more"
