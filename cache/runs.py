"""Runs and their steps: what was measured, how far it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.cache.keys import canonical
from bitatlas.cache.part import Part

__all__ = ["Emitted", "RunInfo", "Runs", "insert_run"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run.

    Attributes:
        run: its key; model_digest: of what; metric: name of the metric that ran (it may emit several).
        formats, calibration (digest), settings, provenance: as given to `begin_run`.
        started, finished: Unix seconds; finished is None while it is not complete.
        steps: finished steps.
    """

    run: str
    model_digest: str
    metric: str
    formats: tuple[str, ...]
    calibration: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    started: float
    finished: float | None
    steps: int = 0

    @property
    def quantizer(self) -> str:
        """How the codes were chosen whose damage it measured."""
        return str(self.settings.get("quantizer", "rtn"))


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a finished run gave: one metric, its formats and its number of rows."""

    metric: str
    run: str
    formats: tuple[str, ...]
    rows: int
    finished: float


_SELECT = """SELECT r.run, r.model, r.metric, r.formats, r.calibration, r.settings, r.provenance, r.stamp, f.stamp,
    (SELECT count(*) FROM steps s WHERE s.run = r.run) FROM runs r LEFT JOIN finished f ON f.run = r.run"""


def _info(row: tuple[Any, ...]) -> RunInfo:
    return RunInfo(
        row[0], row[1], row[2], tuple(json.loads(row[3])), row[4], json.loads(row[5]), json.loads(row[6]),
        row[7], row[8], int(row[9]),
    )  # fmt: skip


def insert_run(con: Any, info: RunInfo) -> None:
    """Insert the description of a run (and its end, if it has one); known ones stay."""
    con.execute(
        "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [info.run, info.model_digest, info.metric, canonical(list(info.formats)), info.calibration,
         canonical(info.settings), canonical(info.provenance), info.started],
    )  # fmt: skip
    if info.finished is not None:
        con.execute("INSERT INTO finished VALUES (?, ?) ON CONFLICT DO NOTHING", [info.run, info.finished])
        con.execute(
            """INSERT INTO emitted SELECT run, metric, format, count(*) FROM damage WHERE run = ?
               GROUP BY run, metric, format ON CONFLICT DO NOTHING""",
            [info.run],
        )


class Runs(Part):
    """`begin_run`, `finish_run`, `run`, `runs`, `steps_done`, `metrics_of`, `latest_run`."""

    def begin_run(
        self,
        run: str,
        model_digest: str,
        metric: str,
        *,
        settings: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        formats: Iterable[str] = (),
        calibration: str = "",
    ) -> None:
        """Describe a run before its first row. A run that is there already stays as it is."""
        info = RunInfo(
            run, model_digest, metric, tuple(formats), calibration, dict(settings or {}), dict(provenance or {}),
            time.time(), None,
        )  # fmt: skip
        with self.db.write() as con:
            insert_run(con, info)

    def finish_run(self, run: str) -> None:
        """Mark a run complete, write its Parquet copy and checkpoint. Harmless when repeated.

        Raises:
            UserError: no such run.
        """
        info = self.run(run)
        if info.finished is None:
            with self.db.write() as con:
                insert_run(con, replace(info, finished=time.time()))
        self.export_run(run)

    def export_run(self, run: str) -> None:
        """Write the Parquet copy of a run (description, steps, rows), replacing an older one."""
        info = self.run(run)
        with self.db.read() as con:
            sql = "SELECT * FROM damage WHERE run = ? ORDER BY metric, format, unit"
            table = con.sql(sql, params=[run]).to_arrow_table()
            steps = [
                r[0]
                for r in con.execute("SELECT step FROM steps WHERE run = ? ORDER BY step", [run]).fetchall()
            ]
            tried = con.sql(
                "SELECT * FROM candidates WHERE run = ? ORDER BY stamp", params=[run]
            ).to_arrow_table()
        self.copies.run(info, steps, table)
        if tried.num_rows:
            self.copies.candidates(run, tried)

    def run(self, run: str) -> RunInfo:
        """One run.

        Raises:
            UserError: no such run.
        """
        with self.db.read() as con:
            found = con.execute(_SELECT + " WHERE r.run = ?", [run]).fetchall()
        if not found:
            raise UserError("there is no such run in the store", found=run, fix="bitatlas jobs list")
        return _info(found[0])

    def runs(self, model_digest: str | None = None) -> list[RunInfo]:
        """Runs (of one model), newest first."""
        where, values = (" WHERE r.model = ?", [model_digest]) if model_digest else ("", [])
        with self.db.read() as con:
            rows = con.execute(_SELECT + where + " ORDER BY r.stamp DESC", values).fetchall()
        return [_info(row) for row in rows]

    def steps_done(self, run: str) -> set[str]:
        """Step keys of the run whose rows are in the store."""
        with self.db.read() as con:
            return {r[0] for r in con.execute("SELECT step FROM steps WHERE run = ?", [run]).fetchall()}

    def metrics_of(self, model_digest: str) -> list[Emitted]:
        """What is known about a model: metric, run, formats, rows of every finished run, newest first."""
        with self.db.read() as con:
            rows = con.execute(
                """SELECT e.metric, e.run, list(e.format ORDER BY e.format), sum(e.n), f.stamp FROM emitted e
                   JOIN runs r ON r.run = e.run JOIN finished f ON f.run = e.run WHERE r.model = ?
                   GROUP BY e.metric, e.run, f.stamp ORDER BY f.stamp DESC, e.metric""",
                [model_digest],
            ).fetchall()
        return [Emitted(m, run, tuple(formats), int(n), at) for m, run, formats, n, at in rows]

    def latest_run(
        self, model_digest: str, metric: str, formats: Iterable[str] = (), quantizer: str = ""
    ) -> str | None:
        """Newest finished run of the model that gave ``metric`` for all ``formats``; None when there is none.

        A metric that does not depend on the format answers for every format. ``quantizer``: only a run that rounded with
        this one; "" = any.
        """
        wanted = set(formats)
        for found in self.metrics_of(model_digest):
            fits = found.metric == metric and (wanted <= set(found.formats) or found.formats == ("-",))
            if fits and (not quantizer or self.run(found.run).quantizer == quantizer):
                return found.run
        return None
