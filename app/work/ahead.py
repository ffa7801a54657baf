"""Weights-only steps on all cores: child processes compute parts ahead of the worker, which asks for one step at a time.

A child leaves the very part files that the engine itself would have left, so a job that is killed goes on from the
parts that are there, whoever made them, and the rows are the same with one process and with many.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.lifeline import die_with
from bitatlas.app.jobs.settings import parallel_jobs
from bitatlas.cache.paths import Home

if TYPE_CHECKING:
    from bitatlas.app.work.measure import MeasureWork

__all__ = ["Ahead", "processes"]

_WORTH_IT = 1 << 27  # weights looked at: below, starting processes takes longer than the work
_PROCESS_BYTES = 768 << 20
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def processes(weights: int) -> int:
    """Processes for a scan that looks at so many weights: ``$BITATLAS_PROCESSES``, else the cores of one job.

    Fewer where memory is short: each takes some 0.6 GB, torch included, whatever the checkpoint.
    """
    named = os.environ.get("BITATLAS_PROCESSES", "").strip()
    if named.isdigit():
        return max(1, int(named))
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = psutil.virtual_memory().available // _PROCESS_BYTES
    return max(1, min(cores, room) // parallel_jobs()) if weights >= _WORTH_IT else 1


class Ahead:
    """Runs the groups of ``work`` in child processes, in order; none are started for little work or on one core."""

    def __init__(self, work: MeasureWork, weights: int) -> None:
        self._work = work
        self._pool: ProcessPoolExecutor | None = None
        self._futures: dict[str, Future[dict[str, str] | None]] = {}
        todo = [keys for keys in work.groups() if not all(map(work.saved, keys))]
        self._count = min(processes(weights), len(todo))
        self._groups: Mapping[str, Sequence[str]] = {key: keys for keys in todo for key in keys}
        if self._count > 1:
            self._start(todo)

    def _start(self, todo: Sequence[Sequence[str]]) -> None:
        # One thread each; the libraries read these when they are loaded, so they must stand before.
        before = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, "1"))
        try:
            self._pool = ProcessPoolExecutor(
                self._count,
                get_context("spawn"),
                _begin,
                (dict(self._work.params), self._work.home, os.getpid()),
            )
            for keys in todo:
                future = self._pool.submit(_group, list(keys))
                self._futures.update(dict.fromkeys(keys, future))
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def wait(self, key: str) -> None:
        """Return when the part of a step is there.

        Raises:
            UserError: what the work raised, or a child process died.
        """
        future = self._futures.get(key)
        if future is None:
            if key in self._groups:  # no child processes: the same work here
                self._work.run_group(self._groups[key])
            return
        try:
            problem = future.result()
        except BrokenProcessPool:
            raise UserError(
                "a computing process was killed", found=f"during {key}",
                fix="most often the machine ran out of memory: set BITATLAS_PROCESSES=1 and resume the job",
            ) from None  # fmt: skip
        if problem is not None:
            raise UserError(problem["error"], found=problem["found"], fix=problem["fix"])

    def close(self) -> None:
        """End the child processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


_mine: list[MeasureWork] = []


def _begin(params: Mapping[str, Any], home: Home, parent: int) -> None:
    """In a child: die with the engine, one thread, the job's own work object."""
    die_with(parent)
    import torch

    from bitatlas.app.work.measure import MeasureWork

    torch.set_num_threads(1)
    _mine[:] = [MeasureWork(params, home)]


def _group(keys: list[str]) -> dict[str, str] | None:
    """In a child: one group; the user's error as a dictionary."""
    try:
        _mine[0].run_group(keys)
    except UserError as e:
        return e.to_dict()
    return None
