"""The worker: the process that runs jobs. ``python -m bitatlas.app.worker``; one for each data folder.

Started on demand by `bitatlas.app.jobs.service`, or by hand to keep it (``--stay``). It computes nothing itself
and loads no torch: each job has an engine process of its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitatlas.app.jobs.settings import (
    QUEUE,
    dbos_config,
    jobs_url,
    parallel_jobs,
    prepare_database,
)  # fmt: skip
from bitatlas.cache.paths import Home

__all__ = ["main", "worker_lock"]

log = logging.getLogger("bitatlas.worker")

_POLL_S = 0.5
_ACTIVE = ["PENDING", "ENQUEUED", "DELAYED"]
# A job that DBOS calls running but nobody runs: its execution broke off, for instance on a full disk.
_LOST_S = 10.0


def worker_lock(home: Home) -> FileLock:
    """The lock that the worker of a data folder holds while it lives; the kernel frees it however it ends."""
    return FileLock(str(home.folder() / "worker.lock"))


class _Loop:
    """Watches the jobs of this worker: stops cancelled ones, recovers lost ones, knows when it is idle."""

    def __init__(self, dbos: Any) -> None:
        self.dbos = dbos
        self.lost_since: dict[str, float] = {}

    def active(self) -> list[Any]:
        return list(self.dbos.list_workflows(status=_ACTIVE, load_input=False, load_output=False))

    def stop_cancelled(self) -> None:
        from bitatlas.app.jobs.workflow import sessions

        running = sessions()
        if not running:
            return
        found = self.dbos.list_workflows(
            workflow_ids=list(running), status=["CANCELLED"], load_input=False, load_output=False
        )
        for status in found:
            log.info("job %s is cancelled", status.workflow_id)
            session = running[status.workflow_id]
            session.stop()
            session.log("cancelled")

    def recover_lost(self, active: list[Any], executor: str) -> None:
        from bitatlas.app.jobs.workflow import sessions

        running, now = sessions(), time.monotonic()
        lost = {
            s.workflow_id
            for s in active
            if s.status == "PENDING" and s.executor_id == executor and s.workflow_id not in running
        }
        self.lost_since = {job: self.lost_since.get(job, now) for job in lost}
        if any(now - since > _LOST_S for since in self.lost_since.values()):
            log.warning("taking up again: %s", ", ".join(sorted(lost)))
            self.lost_since.clear()
            # There is no public call for this; a restart of the process would do the same.
            self.dbos._recover_pending_workflows([executor])


def _stop_engines_and_leave(signum: int, frame: object) -> None:
    from bitatlas.app.jobs.workflow import sessions

    # Jobs stay "running" in the database, so the next worker takes them up where they are.
    for session in sessions().values():
        session.stop()
    os._exit(0)


def _run(home: Home, idle_s: float) -> None:
    from dbos import DBOS

    from bitatlas.app.jobs import workflow

    workflow.configure(home)
    prepare_database(home)
    config = dbos_config(home)
    dbos = DBOS(config=config)
    DBOS.launch()
    DBOS.register_queue(
        QUEUE, worker_concurrency=parallel_jobs(), polling_interval_sec=_POLL_S, on_conflict="always_update"
    )
    log.info("worker %d runs jobs of %s from %s", os.getpid(), home.root, jobs_url(home).split("@")[-1])
    loop, quiet_since, looked = _Loop(dbos), time.monotonic(), 0.0
    while True:
        time.sleep(_POLL_S)
        try:
            loop.stop_cancelled()
            if time.monotonic() - looked < 2.0:
                continue
            looked = time.monotonic()
            active = loop.active()
            loop.recover_lost(active, config["executor_id"])
        except Exception as e:  # noqa: BLE001 - a full disk or a lost database connection passes; the worker stays
            log.warning("looking after the jobs: %s", e)
            continue
        if active:
            quiet_since = looked
        elif looked - quiet_since > idle_s:
            log.info("nothing to do for %.0f s, leaving", idle_s)
            break
    DBOS.destroy()


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0 also when another worker is there already."""
    parser = argparse.ArgumentParser(prog="bitatlas worker", description="Run jobs until there are none.")
    parser.add_argument("--home", help="data folder (default: $BITATLAS_HOME)")
    parser.add_argument("--idle-minutes", type=float, default=10.0, help="leave after so long without a job")
    parser.add_argument("--stay", action="store_true", help="never leave")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    home = Home(Path(args.home).absolute()) if args.home else Home.default()
    home.check_writable()
    os.environ["BITATLAS_HOME"] = str(home.root)
    lock = worker_lock(home)
    try:
        # Clients that look whether a worker lives hold the lock for an instant.
        lock.acquire(timeout=3.0)
    except Timeout:
        log.info("another worker is there already")
        return 0
    signal.signal(signal.SIGTERM, _stop_engines_and_leave)
    signal.signal(signal.SIGINT, _stop_engines_and_leave)
    try:
        _run(home, float("inf") if args.stay else args.idle_minutes * 60)
    finally:
        lock.release()
    # A job may have come between the last look and the release of the lock.
    from bitatlas.app.jobs.service import Jobs

    Jobs(home).start_worker_if_needed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
