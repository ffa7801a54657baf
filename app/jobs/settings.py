"""Names and addresses that worker and clients share."""

from __future__ import annotations

import os
import socket
import sqlite3
from contextlib import closing
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.cache.keys import digest
from bitatlas.cache.paths import Home

__all__ = [
    "APP_NAME", "APP_VERSION", "PROGRESS", "QUEUE", "WORKFLOW", "damaged", "dbos_config", "jobs_url", "parallel_jobs",
    "prepare_database",
]  # fmt: skip

APP_NAME = "bitatlas"
# Fixed: a new release must pick up the jobs of the old one. Raised only when run_job's steps change their order.
APP_VERSION = "1"
QUEUE = "jobs"
WORKFLOW = "run_job"
PROGRESS = "progress"


def jobs_url(home: Home) -> str:
    """``$BITATLAS_JOBS_URL``, else SQLite in the data folder."""
    return os.environ.get("BITATLAS_JOBS_URL", "").strip() or f"sqlite:///{home.jobs_db}"


def parallel_jobs() -> int:
    """Jobs that one worker runs at a time (``$BITATLAS_PARALLEL_JOBS``, default 1)."""
    text = os.environ.get("BITATLAS_PARALLEL_JOBS", "")
    return max(1, int(text)) if text.strip().isdigit() else 1


def dbos_config(home: Home) -> Any:
    """The worker's DBOS configuration: JSON instead of pickle, no console line, a lasting executor id."""
    from dbos import DBOSPortableJSONSerializer

    return {
        "name": APP_NAME,
        "system_database_url": jobs_url(home),
        "application_version": APP_VERSION,
        # The same machine and folder is the same executor, so the next worker recovers what the last one left.
        "executor_id": f"{socket.gethostname()}-{digest(str(home.root))[:8]}",
        "serializer": DBOSPortableJSONSerializer(),
        "log_level": "WARNING",
        "enable_otlp": False,
        "notification_listener_polling_interval_sec": 0.5,
        "scheduler_polling_interval_sec": 3600.0,
    }


def damaged(home: Home, error: Exception) -> UserError:
    """What to say when SQLite cannot read the file of jobs."""
    return UserError("the file of jobs is damaged", found=f"{home.jobs_db}: {error}",
                     fix="move it away; measured results are in another file and stay")  # fmt: skip


def _has_tables(home: Home) -> bool:
    if not home.jobs_db.exists():
        return False
    with closing(sqlite3.connect(f"file:{home.jobs_db}?mode=ro", uri=True, timeout=10)) as con:
        sql = "SELECT count(*) FROM sqlite_master WHERE name = 'workflow_events_history'"
        return bool(con.execute(sql).fetchone()[0])


def prepare_database(home: Home) -> None:
    """Make the job tables if they are missing, so that a client may come before the first worker.

    Raises:
        UserError: the data folder cannot be written.
    """
    url = jobs_url(home)
    if url.startswith("sqlite"):
        home.check_writable()
        try:
            if _has_tables(home):
                return
        except sqlite3.DatabaseError as e:
            raise damaged(home, e) from None
    from dbos import DBOS

    DBOS.migrate(url)
