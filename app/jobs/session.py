"""The worker's side of an engine: start it, ask it, kill it, and say in words how it died."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bitatlas.app.jobs.progress import Progress
from bitatlas.app.jobs.settings import parallel_jobs
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["JobFailed", "Session", "Stopped", "death_in_words", "thread_limits"]

_TICK_S = 0.5

# The kernel's "die with your parent" looks at the thread that started the child, so one lasting thread starts all.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-starter")


class JobFailed(Exception):
    """The job cannot go on; the text is for people.

    ``data`` is the user's error as `UserError.to_dict` gives it, None when it is our fault; DBOS keeps it.
    """

    def __init__(self, text: str, data: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.data = data


class Stopped(Exception):
    """The engine was stopped on purpose: cancelled, or a newer session of the same job took over."""


def death_in_words(code: int) -> str:
    """What an engine's exit status means."""
    if code == -signal.SIGKILL:
        return ("The computing process was killed (signal 9). Most often the machine ran out of memory: "
                "try fewer tokens or a smaller batch, then resume the job.")  # fmt: skip
    if code == -getattr(signal, "SIGBUS", 7):
        return ("The computing process was stopped by a bus error (signal 7): a file it had mapped became shorter "
                "while it was read, or the disk is full. Check the checkpoint, then resume the job.")  # fmt: skip
    if code == -signal.SIGSEGV:
        return "The computing process crashed (signal 11, segmentation fault). The log may say more."
    if code < 0:
        return f"The computing process was ended by signal {-code}. The log may say more."
    return f"The computing process ended by itself with status {code}. The log may say more."


def thread_limits(environ: Mapping[str, str]) -> dict[str, str]:
    """Threads of an engine's products: the user's ``OMP_NUM_THREADS``, else this job's share of the cores.

    Both libraries get the same number. Torch takes the larger one, and a second thread that finds no core free makes
    every product wait for it: 30 times slower on a machine that is busy.
    """
    usual = str(max(1, (os.cpu_count() or 1) // parallel_jobs()))
    threads = environ.get("OMP_NUM_THREADS") or usual
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


class Session:
    """One execution of a job in this worker: its engine, its progress, the steps the store has.

    Args:
        job: job id; kind, params: of the request; home: the data folder.
    """

    def __init__(self, job: str, kind: str, params: Mapping[str, Any], home: Home) -> None:
        self.job, self.kind, self.params, self.home = job, kind, dict(params), home
        self.store = Store(home, wait_s=60.0)
        self.progress = Progress()
        self.stopped = threading.Event()
        self.described: list[dict[str, Any]] = []
        self.runs: list[str] = []
        self.known: set[str] = set()
        self._engine: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self._guard = threading.RLock()

    def log(self, text: str) -> None:
        """One line into the job's log."""
        line = f"{time.strftime('%H:%M:%S')} {text}\n"
        try:
            with open(self.home.logs(self.job), "ab") as f:
                f.write(line.encode())
        except OSError as e:
            # A full disk must not hide the reason that the job itself gives.
            sys.stderr.write(f"log of {self.job}: {e}\n")

    def ask(self, request: dict[str, Any], tick: Callable[[], None]) -> dict[str, Any]:
        """Send a request and wait for its answer, calling ``tick`` about twice a second.

        Raises:
            JobFailed: the work raised an error, or the engine died.
            Stopped: `stop` was called.
        """
        engine = self._started()
        try:
            assert engine.stdin is not None
            engine.stdin.write(json.dumps({**request, "params": self.params}).encode() + b"\n")
            engine.stdin.flush()
        except OSError:
            pass  # dead already; its end of file follows below and says how
        while True:
            if self.stopped.is_set():
                raise Stopped
            try:
                line = self._answers.get(timeout=_TICK_S)
            except queue.Empty:
                tick()
                continue
            if line is None:
                raise self._ended(engine)
            answer = json.loads(line)
            if "progress" in answer:
                note, fraction = answer["progress"]
                self.progress.note, self.progress.fraction = str(note), float(fraction or 0.0)
                continue
            if "error" in answer:
                raise JobFailed(answer["error"], answer.get("user"))
            return dict(answer["ok"])

    def _ended(self, engine: subprocess.Popen[bytes]) -> Exception:
        code = engine.wait()
        self._engine = None
        if self.stopped.is_set():
            return Stopped()
        words = death_in_words(code)
        self.log(words)
        return JobFailed(words)

    def _started(self) -> subprocess.Popen[bytes]:
        with self._guard:
            if self.stopped.is_set():
                raise Stopped
            if self._engine is None:
                self._engine = _starter.submit(self._start).result()
            return self._engine

    def _start(self) -> subprocess.Popen[bytes]:
        env = {**thread_limits(os.environ), **os.environ}
        env["BITATLAS_HOME"] = str(self.home.root)
        env["PYTHONUNBUFFERED"] = "1"
        command = [sys.executable, "-m", "bitatlas.app.jobs.engine", "--home", str(self.home.root),
                   "--kind", self.kind, "--parent", str(os.getpid())]  # fmt: skip
        answers: queue.Queue[bytes | None] = queue.Queue()
        self._answers = answers
        with open(self.home.logs(self.job), "ab") as log:
            engine = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                start_new_session=True,
            )

        def read() -> None:
            assert engine.stdout is not None
            for line in engine.stdout:
                answers.put(line)
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        return engine

    def stop(self) -> None:
        """Kill the engine and everything it started; whoever waits for it gets `Stopped`. Harmless when repeated."""
        self.stopped.set()
        with self._guard:
            engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            # The engine leads its own session, so its children go with it.
            os.killpg(engine.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError, AttributeError):
            engine.kill()
        engine.wait()
