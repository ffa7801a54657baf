"""Model indexes in the store: one row a model, one row a unit."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from typing import Any

import pyarrow as pa

from bitatlas.analysis.schema import ModelIndex, UserError
from bitatlas.cache.arrow import UNITS, insert
from bitatlas.cache.keys import canonical
from bitatlas.cache.part import Part

__all__ = ["Models", "head_of", "index_from", "insert_model", "units_table"]

_FIELDS = ("key", "role", "layer", "expert", "rows", "cols", "tensor", "part", "transposed", "interleaved")


def units_table(index: ModelIndex) -> pa.Table:
    """The units as an Arrow table with the columns of `UNITS`, in model order."""
    columns: dict[str, list[Any]] = {f: [getattr(u, f) for u in index.units] for f in _FIELDS}
    columns["model"] = [index.digest] * len(index.units)
    columns["ord"] = list(range(len(index.units)))
    return pa.table(columns, schema=UNITS)


def head_of(index: ModelIndex) -> dict[str, Any]:
    """Everything of an index but its units, JSON-able."""
    plain = {f.name: getattr(index, f.name) for f in fields(index) if f.name not in ("units", "kept", "kv")}
    plain["kept"] = [[k.name, list(k.shape), k.dtype, k.nbytes] for k in index.kept]
    kv = index.kv
    plain["kv"] = None if kv is None else [list(kv.heads), kv.head_dim, list(kv.windows), kv.v_dim]
    return plain


def index_from(head: dict[str, Any], columns: dict[str, list[Any]]) -> ModelIndex:
    """A `ModelIndex` from its stored head and the unit columns."""
    data = dict(head)
    data["units"] = [dict(zip(_FIELDS, values)) for values in zip(*(columns[f] for f in _FIELDS))]
    data["kept"] = [dict(zip(("name", "shape", "dtype", "nbytes"), k)) for k in head["kept"]]
    if head["kv"]:
        data["kv"] = dict(zip(("heads", "head_dim", "windows", "v_dim"), head["kv"]))
    return ModelIndex.from_dict(data)


def insert_model(con: Any, index: ModelIndex) -> None:
    """Insert a model; a known digest only gets its new path and name."""
    known = con.execute("SELECT 1 FROM models WHERE digest = ?", [index.digest]).fetchall()
    head = canonical(head_of(index))
    if known:
        sql = "UPDATE models SET path = ?, name = ?, head = ? WHERE digest = ?"
        con.execute(sql, [index.path, index.name, head, index.digest])
        return
    con.execute(
        "INSERT INTO models VALUES (?, ?, ?, ?, ?, ?)",
        [index.digest, index.name, index.path, len(index.units), head, time.time()],
    )
    insert(con, "units", units_table(index))


class Models(Part):
    """`put_model`, `model`, `models`."""

    def put_model(self, index: ModelIndex) -> str:
        """Store a model index; returns its digest. The same checkpoint at another path updates the path."""
        with self.db.write() as con:
            insert_model(con, index)
        self.copies.model(index)
        return index.digest

    def model(self, digest: str) -> ModelIndex:
        """The index of a model.

        Raises:
            UserError: no such model.
        """
        with self.db.read() as con:
            found = con.execute("SELECT head FROM models WHERE digest = ?", [digest]).fetchall()
            if not found:
                raise UserError("this model is not in the store", found=digest, fix="bitatlas scan MODEL")
            names = ", ".join(f'"{f}"' for f in _FIELDS)
            sql = f"SELECT {names} FROM units WHERE model = ? ORDER BY ord"
            table = con.sql(sql, params=[digest]).to_arrow_table()
        return index_from(json.loads(found[0][0]), table.to_pydict())

    def models(self) -> list[dict[str, Any]]:
        """Known models, newest first: digest, name, path, n_units, architecture, n_experts, params, at."""
        with self.db.read() as con:
            rows = con.execute(
                """SELECT m.digest, m.name, m.path, m.n_units, m.head, m.stamp, sum(u."rows" * u.cols)
                   FROM models m LEFT JOIN units u ON u.model = m.digest GROUP BY ALL ORDER BY m.stamp DESC"""
            ).fetchall()
        out = []
        for digest, name, path, n_units, head, at, params in rows:
            more = json.loads(head)
            out.append(
                {"digest": digest, "name": name, "path": path, "n_units": n_units, "at": at,
                 "architecture": more["architecture"], "n_experts": more["n_experts"], "params": int(params or 0)}
            )  # fmt: skip
        return out
