"""The one object that reads and writes results."""

from __future__ import annotations

from typing import Any

from bitatlas.cache.connect import Database
from bitatlas.cache.copies import Copies
from bitatlas.cache.damage import Damage
from bitatlas.cache.paths import Home
from bitatlas.cache.study import Studies, restore

__all__ = ["Store", "rebuild"]


class Store(Studies, Damage):
    """Results below a `Home`: models, runs, damage, allocations, verifications, frontiers, candidates.

    Keeps no connection open: every method opens the file, works and closes it, waiting at most ``wait_s``
    for other processes. Every write is idempotent. Safe to share between threads.

    Raises (all methods):
        StoreBusy: others kept the file for ``wait_s``.
        UserError: disk full, read-only folder, a file of a newer bitatlas.
    """

    def __init__(self, home: Home, wait_s: float = 10.0) -> None:
        self.home = home
        copies = home.root / "parquet"
        self.copies = Copies(copies)
        self.db = Database(home, restore(copies), wait_s)

    def repairs(self) -> list[dict[str, Any]]:
        """What had to be set aside so far (``{"at", "error", "moved"}``); unfinished runs must run again."""
        return self.db.repairs()


def rebuild(home: Home) -> None:
    """Move the results file aside and make it again from the copies of finished results."""
    Store(home).db.remake()
