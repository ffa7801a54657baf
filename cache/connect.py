"""Short-lived connections to the results file: read-write for one transaction, read-only for one read.

DuckDB lets one process hold the file read-write, or many read-only. So nobody holds it: every read and every
transaction opens, works and closes (tens of milliseconds), and retries with jitter, up to a bound, when
another process is in. The live file is never opened by anything but DuckDB: closing a second descriptor would
drop the process's POSIX lock.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
from filelock import FileLock, Timeout

from bitatlas.analysis.schema import UserError
from bitatlas.cache.migrations import SCHEMA_VERSION, migrate, version_of
from bitatlas.cache.paths import Home, disk_error

__all__ = ["Database", "StoreBusy"]

log = logging.getLogger(__name__)

_CONFIG = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
_BUSY = ("could not set lock", "different configuration", "conflicting lock")
_DAMAGED = ("not a valid duckdb database", "corrupt database file", "failed to load metadata pointer")
_BAD_LOG = ("replaying wal", "corrupt wal")
# What can go wrong while a sound log is read: nothing is moved aside for these.
_NOT_DAMAGE = (
    "no space left",
    "permission denied",
    "read-only file system",
    "out of memory",
    "too many open",
)

# One process must not mix read-only and read-write connections, so its threads take turns.
_turns: dict[str, threading.Lock] = {}
_turns_guard = threading.Lock()


class StoreBusy(UserError):
    """Other processes kept the results file for the whole waiting time. Trying again is safe."""


def _says(error: Exception | str, phrases: tuple[str, ...]) -> bool:
    words = str(error).lower()
    return any(phrase in words for phrase in phrases)


def _turn(path: Path) -> threading.Lock:
    with _turns_guard:
        return _turns.setdefault(str(path), threading.Lock())


class Database:
    """Opens and closes the results file of a `Home`.

    Args:
        home: where it lies.
        restore: called with an open connection to load the Parquet copies, after damage was set aside.
        wait_s: bound on waiting for other processes.
    """

    def __init__(self, home: Home, restore: Callable[[Any], None], wait_s: float = 10.0) -> None:
        self.home, self.restore, self.wait_s = home, restore, wait_s

    @contextmanager
    def read(self) -> Iterator[Any]:
        """A read-only connection. Fetch everything before leaving; an open result owns the connection.

        Raises:
            StoreBusy, UserError: see `_open` and `_translate`.
        """
        with self._connection(read_only=True) as con:
            yield con

    @contextmanager
    def write(self) -> Iterator[Any]:
        """A read-write connection inside one transaction: committed on leaving, rolled back on an error."""
        with self._connection(read_only=False) as con:
            con.execute("BEGIN")
            try:
                yield con
            except BaseException:
                # After a fatal error (disk full) DuckDB has rolled back already and refuses to do it again.
                try:
                    con.execute("ROLLBACK")
                except duckdb.Error as e:
                    log.debug("rollback: %s", e)
                raise
            con.execute("COMMIT")

    @contextmanager
    def _connection(self, read_only: bool) -> Iterator[Any]:
        deadline = time.monotonic() + self.wait_s
        turn = _turn(self.home.db)
        if not turn.acquire(timeout=self.wait_s):
            raise self._busy("another thread of this process")
        try:
            con = self._open(read_only, deadline)
            try:
                yield con
            finally:
                con.close()
        except duckdb.Error as e:
            if _says(e, _DAMAGED):
                raise self._replace_damaged(str(e), deadline) from e
            raise self._translate(e) from e
        finally:
            turn.release()

    def _open(self, read_only: bool, deadline: float) -> Any:
        pause, upgrade = 0.003, False
        while True:
            if not self.home.db.exists():
                self._create(deadline)
                deadline = max(deadline, time.monotonic() + self.wait_s)
            writing = upgrade or not read_only
            try:
                con = duckdb.connect(str(self.home.db), read_only=not writing, config=_CONFIG)
            except duckdb.Error as e:
                if _says(e, _BUSY):
                    if time.monotonic() > deadline:
                        raise self._busy(str(e).split(" See also")[0]) from None
                    time.sleep(pause * random.uniform(0.5, 1.5))
                    pause = min(pause * 1.6, 0.1)
                    continue
                if _says(e, (*_BAD_LOG, *_DAMAGED)) and not _says(e, _NOT_DAMAGE):
                    self._set_aside(deadline)
                    continue
                raise
            try:
                found = version_of(con)
                if found == SCHEMA_VERSION and writing != read_only:
                    return con
                if 0 < found < SCHEMA_VERSION and writing:
                    self._backup(con, found)
                if found > SCHEMA_VERSION or writing:
                    migrate(con)
            except BaseException:
                con.close()
                raise
            con.close()
            upgrade = found < SCHEMA_VERSION and not writing

    def _create(self, deadline: float) -> None:
        # Made under another name with all its tables, then renamed: a kill leaves no half-made file.
        self.home.check_writable()
        with self._exclusive(deadline):
            if self.home.db.exists():
                return
            temporary = self.home.db.with_name(f"new-{os.getpid()}-{threading.get_ident()}.duckdb.tmp")
            temporary.unlink(missing_ok=True)
            con = duckdb.connect(str(temporary), config=_CONFIG)
            try:
                migrate(con)
                self.restore(con)
                con.execute("CHECKPOINT")
            except BaseException:
                con.close()
                temporary.unlink(missing_ok=True)
                raise
            con.close()
            # A log without its file belongs to a results file that somebody removed.
            for orphan in self._wal_files():
                self._move(orphan, "orphan")
            os.replace(temporary, self.home.db)

    def _set_aside(self, deadline: float) -> None:
        """Move a log (then a file) that will not open out of the way, and load the Parquet copies again."""
        with self._exclusive(deadline):
            try:
                duckdb.connect(str(self.home.db), read_only=True, config=_CONFIG).close()
                return  # another process repaired it while this one waited
            except duckdb.Error as e:
                words = str(e)
            if _says(words, (*_BUSY, *_NOT_DAMAGE)) or not self.home.db.exists():
                return
            moved = [self._move(p, "corrupt") for p in self._wal_files()]
            if _says(words, _DAMAGED):
                moved.append(self._move(self.home.db, "corrupt"))
            elif not moved:
                raise UserError("the results file cannot be opened", found=words, fix="bitatlas doctor")
            self._note_repair(words, moved)
            if self.home.db.exists():
                try:
                    with duckdb.connect(str(self.home.db), config=_CONFIG) as con:
                        migrate(con)
                        self.restore(con)
                except duckdb.Error as e:
                    log.warning("after the repair: %s", e)

    def _replace_damaged(self, words: str, deadline: float) -> UserError:
        """Set a file aside that opens but cannot be read; the next access makes it again from the copies."""
        with self._exclusive(deadline):
            try:
                # Held read-write while it is moved: nobody else can be writing to it.
                with duckdb.connect(str(self.home.db), config=_CONFIG):
                    moved = [self._move(p, "corrupt") for p in (*self._wal_files(), self.home.db)]
            except duckdb.Error as e:
                return UserError("the results file is damaged", found=f"{words}; {e}", fix="run it again")
            self._note_repair(words, moved)
        return UserError(
            "the results file was damaged",
            found=f"{words}; it was set aside as {moved[-1].name}",
            fix="run it again: finished results come back from their copies, unfinished runs must be resumed",
        )

    def _note_repair(self, words: str, moved: list[Path]) -> None:
        names = [p.name for p in moved]
        log.warning("results file repaired: %s set aside (%s)", ", ".join(names), words)
        with open(self.home.root / "repairs.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"at": time.time(), "error": words, "moved": names}) + "\n")

    def repairs(self) -> list[dict[str, Any]]:
        """What was set aside so far, oldest first: ``{"at", "error", "moved"}``."""
        path = self.home.root / "repairs.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def remake(self) -> None:
        """Move the present file aside and make a new one from the Parquet copies."""
        deadline = time.monotonic() + self.wait_s
        with _turn(self.home.db), self._exclusive(deadline):
            for path in [*self._wal_files(), self.home.db]:
                if path.exists():
                    self._move(path, "replaced")
        with self.read():
            pass

    def _wal_files(self) -> list[Path]:
        found = self.home.root.glob(self.home.db.name + ".wal*")
        return sorted(p for p in found if ".corrupt-" not in p.name and ".orphan-" not in p.name
                      and ".replaced-" not in p.name)  # fmt: skip

    def _move(self, path: Path, why: str) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%S")
        target = path.with_name(f"{path.name}.{why}-{stamp}")
        number = 0
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}.{why}-{stamp}-{number}")
        os.replace(path, target)
        return target

    def _backup(self, con: Any, found: int) -> None:
        target = self.home.db.with_name(f"bitatlas.schema{found}.backup.duckdb")
        target.unlink(missing_ok=True)
        quoted = str(target).replace("'", "''")
        source = con.execute("SELECT current_database()").fetchall()[0][0]
        con.execute(f"ATTACH '{quoted}' AS backup")
        con.execute(f'COPY FROM DATABASE "{source}" TO backup')
        con.execute("DETACH backup")

    @contextmanager
    def _exclusive(self, deadline: float) -> Iterator[None]:
        lock = FileLock(str(self.home.folder() / "store.lock"))
        try:
            with lock.acquire(timeout=max(0.1, deadline - time.monotonic())):
                yield
        except Timeout:
            raise self._busy("another process is repairing it") from None
        except PermissionError as e:
            raise disk_error(e, self.home.root) from None

    def _busy(self, who: str) -> StoreBusy:
        return StoreBusy("the results file is busy", found=who, fix="wait a moment and run it again")

    def _translate(self, error: duckdb.Error) -> Exception:
        words = str(error).lower()
        if "no space left" in words or "disk is full" in words:
            return UserError("the disk is full", found=str(self.home.root),
                             fix="free some space, then run it again; nothing stored before is lost")  # fmt: skip
        if "read-only file system" in words or "permission denied" in words:
            return UserError("the data folder may not be written", found=str(self.home.root),
                             fix="set BITATLAS_HOME to a folder that can be written")  # fmt: skip
        return error
