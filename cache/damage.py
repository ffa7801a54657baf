"""The measured rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bitatlas.analysis.schema import FORMATS, DamageRow, SensitivityTable, UserError
from bitatlas.cache.arrow import damage_table, insert
from bitatlas.cache.part import Part

__all__ = ["Damage"]

_COLUMNS = "metric, unit, format, value, stderr, count, floor"


class Damage(Part):
    """`write_rows`, `write_step`, `rows`, `table`."""

    def write_rows(self, run: str, rows: Sequence[DamageRow]) -> int:
        """Store rows; those already there stay as they are. Returns the number of new rows."""
        with self.db.write() as con:
            return insert(con, "damage", damage_table(run, rows)) if rows else 0

    def write_step(self, run: str, step: str, rows: Sequence[DamageRow]) -> bool:
        """Store a step's rows and mark it done, in one transaction. False (nothing written) if it was done."""
        with self.db.write() as con:
            sql = "INSERT INTO steps VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            if not con.execute(sql, [run, step, time.time()]).fetchall()[0][0]:
                return False
            if rows:
                insert(con, "damage", damage_table(run, rows))
            return True

    def rows(self, run: str, metric: str | None = None) -> list[DamageRow]:
        """All rows of a run (of one metric), ordered by metric, format and unit."""
        where, values = ("run = ?", [run]) if metric is None else ("run = ? AND metric = ?", [run, metric])
        sql = f"SELECT {_COLUMNS} FROM damage WHERE {where} ORDER BY metric, format, unit"
        with self.db.read() as con:
            return [DamageRow(*r) for r in con.execute(sql, values).fetchall()]

    def table(self, run: str, metric: str, units: Sequence[str]) -> SensitivityTable:
        """The run's damage of one metric as (units, formats) arrays; units without a row are NaN.

        Raises:
            UserError: the run has no row of this metric.
        """
        order = pa.table(
            {"key": pa.array(units, pa.string()), "ord": pa.array(range(len(units)), pa.int32())}
        )
        with self.db.read() as con:
            names = [
                r[0]
                for r in con.execute(
                    "SELECT DISTINCT format FROM damage WHERE run = ? AND metric = ?", [run, metric]
                ).fetchall()
            ]
            con.register("unit_order", order)
            got: dict[str, Any] = con.execute(
                """SELECT u.ord, d.format, d.value, d.stderr, d.count, d.floor FROM damage d
                   JOIN unit_order u ON u.key = d.unit WHERE d.run = ? AND d.metric = ?""",
                [run, metric],
            ).fetchnumpy()
        if not names:
            raise UserError(f"this run has no {metric}", found=f"run {run}", fix="bitatlas metrics")
        position = {name: i for i, name in enumerate(FORMATS)}
        formats = tuple(sorted(names, key=lambda n: (position.get(n, -1), n)))
        shape = (len(units), len(formats))
        damage, stderr, count = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, np.int64)
        column = {name: i for i, name in enumerate(formats)}
        at = (got["ord"], np.array([column[f] for f in got["format"]], np.intp))
        damage[at], stderr[at], count[at] = got["value"], got["stderr"], got["count"]
        floor = float(np.max(got["floor"])) if len(got["floor"]) else 0.0
        return SensitivityTable(metric, tuple(units), formats, damage, stderr, count, floor, run)
