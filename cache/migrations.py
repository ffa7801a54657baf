"""The tables of the results file. DDL stands here and nowhere else, and a CHECKPOINT follows it at once.

Why: what went wrong with DuckDB's log in the field was almost always a table change left in it. There are no
secondary indexes; primary keys make every write idempotent.
"""

from __future__ import annotations

from typing import Any

from bitatlas.analysis.schema import UserError

__all__ = ["SCHEMA_VERSION", "migrate", "version_of"]

# One entry a version; index 0 makes version 1. Entries are never edited once released, only appended.
_STEPS: list[tuple[str, ...]] = [
    (
        "CREATE TABLE meta (key VARCHAR PRIMARY KEY, value VARCHAR)",
        """CREATE TABLE models (digest VARCHAR PRIMARY KEY, name VARCHAR, path VARCHAR, n_units INTEGER,
           head VARCHAR, stamp DOUBLE)""",
        """CREATE TABLE units (model VARCHAR, ord INTEGER, key VARCHAR, role VARCHAR, layer INTEGER,
           expert INTEGER, "rows" BIGINT, cols BIGINT, tensor VARCHAR, part VARCHAR, transposed BOOLEAN,
           interleaved BOOLEAN, PRIMARY KEY (model, ord))""",
        """CREATE TABLE runs (run VARCHAR PRIMARY KEY, model VARCHAR, metric VARCHAR, formats VARCHAR,
           calibration VARCHAR, settings VARCHAR, provenance VARCHAR, stamp DOUBLE)""",
        "CREATE TABLE finished (run VARCHAR PRIMARY KEY, stamp DOUBLE)",
        "CREATE TABLE steps (run VARCHAR, step VARCHAR, stamp DOUBLE, PRIMARY KEY (run, step))",
        """CREATE TABLE damage (run VARCHAR, metric VARCHAR, format VARCHAR, unit VARCHAR, value DOUBLE,
           stderr DOUBLE, count BIGINT, floor DOUBLE, PRIMARY KEY (run, metric, format, unit))""",
        """CREATE TABLE emitted (run VARCHAR, metric VARCHAR, format VARCHAR, n BIGINT,
           PRIMARY KEY (run, metric, format))""",
        """CREATE TABLE allocations (id VARCHAR PRIMARY KEY, model VARCHAR, metric VARCHAR, solver VARCHAR,
           bits_per_weight DOUBLE, weights_bytes BIGINT, predicted DOUBLE, body BLOB, stamp DOUBLE)""",
        """CREATE TABLE verifications (id VARCHAR PRIMARY KEY, allocation VARCHAR, model VARCHAR,
           text_digest VARCHAR, tokens BIGINT, kl_mean DOUBLE, kl_p50 DOUBLE, kl_p99 DOUBLE,
           kl_stderr DOUBLE, flips DOUBLE, ppl_before DOUBLE, ppl_after DOUBLE, floor DOUBLE,
           sequences VARCHAR, extra VARCHAR, stamp DOUBLE)""",
        """CREATE TABLE frontiers (id VARCHAR PRIMARY KEY, model VARCHAR, metric VARCHAR, solver VARCHAR,
           run VARCHAR, body BLOB, stamp DOUBLE)""",
        """CREATE TABLE candidates (run VARCHAR, choice_hash VARCHAR, objective DOUBLE, payload_bytes BIGINT,
           tokens BIGINT, extra VARCHAR, stamp DOUBLE, PRIMARY KEY (run, choice_hash))""",
    ),
]

SCHEMA_VERSION = len(_STEPS)


def version_of(con: Any) -> int:
    """Schema version of the open file, 0 when it has no tables yet."""
    has = con.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'meta'").fetchall()[0][0]
    if not has:
        return 0
    found = con.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchall()
    return int(found[0][0]) if found else 0


def migrate(con: Any) -> bool:
    """Bring an open read-write connection to `SCHEMA_VERSION`; True when something was changed.

    Raises:
        UserError: the file was made by a newer bitatlas.
    """
    found = version_of(con)
    if found > SCHEMA_VERSION:
        raise UserError(
            "the results file was made by a newer bitatlas",
            found=f"schema version {found}, this program knows up to {SCHEMA_VERSION}",
            fix="upgrade bitatlas, or set BITATLAS_HOME to another folder",
        )
    if found == SCHEMA_VERSION:
        return False
    con.execute("BEGIN")
    for statements in _STEPS[found:]:
        for statement in statements:
            con.execute(statement)
    con.execute("INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", [str(SCHEMA_VERSION)])
    con.execute("COMMIT")
    con.execute("CHECKPOINT")
    return True
