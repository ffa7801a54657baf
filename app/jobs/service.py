"""Jobs, seen from the command line, from Python and from the pages. Light: no torch, DBOS only when used."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from filelock import Timeout

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.request import JobRequest
from bitatlas.app.jobs.settings import (
    APP_NAME,
    APP_VERSION,
    PROGRESS,
    QUEUE,
    WORKFLOW,
    damaged,
    jobs_url,
    prepare_database,
)
from bitatlas.app.jobs.status import JobStatus, make_status
from bitatlas.app.jobs.work import work_table
from bitatlas.cache.paths import Home, disk_error

__all__ = ["JobRequest", "JobStatus", "Jobs"]

_LOG_TAIL_BYTES = 1 << 20
_MAX_STARTS = 5

# A running job that is silent for so long on a disk with so little left could not even write that it failed.
_SILENT_S = 5.0
_LITTLE_BYTES = 1 << 20

# A worker needs a moment until it holds its lock; meanwhile, unless it dies, nobody here starts another one.
_START_S = 10.0

_started: dict[str, tuple[float, subprocess.Popen[bytes]]] = {}
_clients: dict[str, Any] = {}
_clients_guard = threading.Lock()


@contextmanager
def _in_words(home: Home) -> Iterator[None]:
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except DatabaseError as e:
        words = str(e.orig).lower()
        if "full" in words:
            raise disk_error(OSError(28, str(e.orig)), home.jobs_db) from None
        if "readonly" in words or "unable to open" in words:
            raise disk_error(OSError(30, str(e.orig)), home.jobs_db) from None
        if "not a database" in words or "malformed" in words:
            raise damaged(home, e) from None
        raise


class Jobs:
    """The jobs of a data folder. Keeps no connection of its own; cheap to make; safe to share between threads.

    Args:
        home: the data folder.
        idle_minutes: how long a worker that is started on demand stays without work.

    Raises (all methods):
        UserError: data folder read-only, disk full, no such job.
    """

    def __init__(self, home: Home, idle_minutes: float = 10.0) -> None:
        self.home, self.idle_minutes = home, idle_minutes

    def submit(self, request: JobRequest, *, start_worker: bool = True, again: bool = False) -> str:
        """Queue a request and see to it that a worker lives; returns the job's id.

        The same request is the same job: a queued, running or done one is left alone, a failed, cancelled or
        interrupted one goes on at its first unfinished step. ``again`` runs a done one from its first step.

        Raises:
            UserError: no such kind of job.
        """
        if request.kind not in work_table():
            raise UserError(f"there is no kind of job called {request.kind!r}",
                            found=f"known: {', '.join(sorted(work_table())) or 'none'}")  # fmt: skip
        job = request.id
        with self._client() as client:
            found = self._find(client, job)
            if found is None:
                params = dict(request.params)
                options = {
                    "workflow_name": WORKFLOW, "queue_name": QUEUE, "workflow_id": job, "app_version": APP_VERSION,
                    "attributes": {"kind": request.kind, "title": request.title or request.kind, "params": params},
                }  # fmt: skip
                client.enqueue(options, request.kind, params)
            elif found.status == "SUCCESS" and again:
                client.rewind_workflow(job, start_step=1, queue_name=QUEUE, application_version=APP_VERSION)
            elif found.status != "SUCCESS":
                self._go_on(client, found)
        if start_worker:
            self.start_worker_if_needed()
        return job

    def jobs(self, limit: int = 200) -> list[JobStatus]:
        """Newest first."""
        with self._client() as client:
            found = client.list_workflows(name=WORKFLOW, sort_desc=True, limit=limit, load_input=False)
            alive = self.worker_alive()
            return [self._status(client, f, alive) for f in found]

    def job(self, job: str) -> JobStatus:
        """One job as it is now."""
        with self._client() as client:
            return self._status(client, self._need(client, job), self.worker_alive())

    def logs(self, job: str, tail: int = 200) -> str:
        """The last ``tail`` lines of the job's log; empty before it has started."""
        path = self.home.logs(job)
        if not path.exists():
            self.job(job)
            return ""
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - _LOG_TAIL_BYTES))
            lines = f.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-tail:])

    def cancel(self, job: str) -> None:
        """Cancel; the worker kills the computing process within about a second. A finished job stays as it is."""
        with self._client() as client:
            self._need(client, job)
            client.cancel_workflow(job)

    def resume(self, job: str) -> None:
        """Go on with a cancelled, failed or interrupted job at its first unfinished step."""
        with self._client() as client:
            found = self._need(client, job)
            if found.status == "SUCCESS":
                return
            self._go_on(client, found)
        self.start_worker_if_needed()

    def wait(
        self,
        job: str,
        on_progress: Callable[[JobStatus], None] | None = None,
        *,
        timeout_s: float | None = None,
        poll_s: float = 0.5,
    ) -> JobStatus:
        """Wait until the job is done, failed or cancelled, keeping a worker alive meanwhile.

        Raises:
            TimeoutError: after ``timeout_s``.
            RuntimeError: workers keep dying at their start; carries the end of their log.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        starts, last_done = 0, -1
        while True:
            status = self.job(job)
            if on_progress is not None:
                on_progress(status)
            if status.final:
                return status
            if status.done != last_done:
                starts, last_done = 0, status.done
            if self.start_worker_if_needed():
                starts += 1
                if starts > _MAX_STARTS:
                    raise RuntimeError(f"the worker keeps ending at its start:\n{self.worker_log()}")
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {job} is still {status.state} ({status.done} of {status.total} steps)"
                )
            time.sleep(poll_s)

    def worker_alive(self) -> bool:
        """Whether a worker of this data folder lives on this machine."""
        from bitatlas.app.worker import worker_lock

        lock = worker_lock(self.home)
        for pause in (0.01, 0.0):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                # Somebody else who looks holds the lock too, but only for an instant: look again.
                time.sleep(pause)
            else:
                lock.release()
                return False
        return True

    def start_worker_if_needed(self) -> bool:
        """Start a worker if there are jobs to run and none lives; True when one was started."""
        began, worker = _started.get(str(self.home.root), (0.0, None))
        if worker is not None and worker.poll() is None and time.monotonic() - began < _START_S:
            return False
        if self.worker_alive():
            return False
        with self._client() as client:
            waiting = client.list_workflows(
                name=WORKFLOW,
                status=["PENDING", "ENQUEUED", "DELAYED"],
                limit=1,
                load_input=False,
                load_output=False,
            )
        if not waiting:
            return False
        command = [sys.executable, "-m", "bitatlas.app.worker", "--home", str(self.home.root),
                   "--idle-minutes", str(self.idle_minutes)]  # fmt: skip
        with open(self.home.logs("worker"), "ab") as log:
            # A session of its own: a closed terminal or a stopped dashboard does not reach it.
            worker = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                close_fds=True,
            )
        _started[str(self.home.root)] = (time.monotonic(), worker)
        return True

    def worker_log(self, tail: int = 30) -> str:
        """The end of the workers' log."""
        path = self.home.logs("worker")
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-tail:])

    @contextmanager
    def _client(self) -> Iterator[Any]:
        url = jobs_url(self.home)
        with _in_words(self.home):
            with _clients_guard:
                client = _clients.get(url)
                missing = url.startswith("sqlite") and not self.home.jobs_db.exists()
                if client is None or missing:
                    prepare_database(self.home)
                    from dbos import DBOSClient, DBOSPortableJSONSerializer

                    if client is not None:
                        client.destroy()
                    _clients[url] = client = DBOSClient(
                        system_database_url=url,
                        serializer=DBOSPortableJSONSerializer(),
                        application_name=APP_NAME,
                    )
            yield client

    def _find(self, client: Any, job: str) -> Any:
        found = client.list_workflows(workflow_ids=[job], load_input=False)
        return found[0] if found else None

    def _need(self, client: Any, job: str) -> Any:
        found = self._find(client, job)
        if found is None:
            raise UserError("there is no such job", found=job, fix="bitatlas jobs list")
        return found

    def _go_on(self, client: Any, found: Any) -> None:
        job = found.workflow_id
        if found.status in ("CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"):
            client.resume_workflow(job, queue_name=QUEUE)
        elif found.status == "ERROR":
            # The failed step is the first that must run again; what came before it stays.
            failed = [s["function_id"] for s in client.list_workflow_steps(job) if s["error"] is not None]
            first = min(failed, default=1)
            client.rewind_workflow(job, start_step=first, queue_name=QUEUE, application_version=APP_VERSION)
        elif self._shared() and self._status(client, found, self.worker_alive()).state == "interrupted":
            # Its machine may never come back: take the job from it. Should it come back, it finds itself replaced.
            client.cancel_workflow(job)
            client.resume_workflow(job, queue_name=QUEUE)

    def _status(self, client: Any, found: Any, alive: bool) -> JobStatus:
        progress = None
        if found.status != "SUCCESS":
            progress = client.get_event(found.workflow_id, PROGRESS, timeout_seconds=0)
        status = make_status(found, progress, alive, shared=self._shared())
        if status.state == "running" and (status.heartbeat_age_s or 0) > _SILENT_S:
            free = shutil.disk_usage(self.home.root).free
            note = (
                "the disk is full: free some space and the job goes on"
                if free < _LITTLE_BYTES
                else status.note
            )
            return replace(status, note=note)
        return status

    def _shared(self) -> bool:
        return not jobs_url(self.home).startswith("sqlite")
