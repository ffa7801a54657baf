"""Bulk inserts: columns to an Arrow table to one INSERT, because one statement per row is 500 times slower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from bitatlas.analysis.schema import DamageRow

__all__ = ["DAMAGE", "UNITS", "damage_table", "insert"]

DAMAGE = pa.schema(
    [("run", pa.string()), ("metric", pa.string()), ("format", pa.string()), ("unit", pa.string()),
     ("value", pa.float64()), ("stderr", pa.float64()), ("count", pa.int64()), ("floor", pa.float64())]
)  # fmt: skip

UNITS = pa.schema(
    [("model", pa.string()), ("ord", pa.int32()), ("key", pa.string()), ("role", pa.string()),
     ("layer", pa.int32()), ("expert", pa.int32()), ("rows", pa.int64()), ("cols", pa.int64()),
     ("tensor", pa.string()), ("part", pa.string()), ("transposed", pa.bool_()), ("interleaved", pa.bool_())]
)  # fmt: skip


def damage_table(run: str, rows: Sequence[DamageRow]) -> pa.Table:
    """Rows of a run as an Arrow table with the columns of `DAMAGE`."""
    columns: Mapping[str, list[Any]] = {
        "run": [run] * len(rows),
        "metric": [r.metric for r in rows],
        "format": [r.format for r in rows],
        "unit": [r.unit for r in rows],
        "value": [float(r.value) for r in rows],
        "stderr": [float(r.stderr) for r in rows],
        "count": [int(r.count) for r in rows],
        "floor": [float(r.floor) for r in rows],
    }
    return pa.table(columns, schema=DAMAGE)


def insert(con: Any, name: str, table: pa.Table) -> int:
    """Insert an Arrow table into the table ``name``; rows whose primary key is there stay as they are.

    Returns:
        The number of new rows.
    """
    con.register("incoming", table)
    columns = ", ".join(f'"{c}"' for c in table.column_names)
    sql = f"INSERT INTO {name} ({columns}) SELECT {columns} FROM incoming ON CONFLICT DO NOTHING"
    new = int(con.execute(sql).fetchall()[0][0])
    # Not in a `finally`: after a failed insert this would fail too, and hide why.
    con.unregister("incoming")
    return new
