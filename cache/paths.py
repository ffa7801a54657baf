"""Where everything lies on disk: one folder, `$BITATLAS_HOME` or the platform's data folder."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bitatlas.analysis.schema import UserError

__all__ = ["Home", "atomic_write", "disk_error", "write_output"]


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "bitatlas"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "bitatlas"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bitatlas"


def disk_error(error: OSError, path: Path, *, named: bool = False) -> UserError:
    """The words for an `OSError` on ``path``: read-only, full, not permitted, or what the system says.

    ``named``: a file that the user named, not one of the data folder.
    """
    if named and error.errno not in (28, 122):
        return UserError("this file cannot be written", found=f"{path}: {error.strerror or error}", fix="name another file or folder")  # fmt: skip
    words = {
        30: ("the data folder is read-only", "set BITATLAS_HOME to a folder that can be written"),
        13: ("the data folder may not be written", "set BITATLAS_HOME to a folder of your own"),
        1: ("the data folder may not be written", "set BITATLAS_HOME to a folder of your own"),
        28: ("the disk is full", f"free some space on the disk that holds {path}, then run it again"),
        122: ("the disk quota is used up", "free some space, then run it again"),
    }
    what, fix = words.get(error.errno or 0, ("the data folder cannot be used", "set BITATLAS_HOME elsewhere"))
    return UserError(what, found=f"{path}: {error.strerror or error}", fix=fix)


@dataclass(frozen=True, slots=True)
class Home:
    """The data folder. Making the object touches nothing; folders appear when they are first asked for."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """From ``$BITATLAS_HOME``, else the platform's data folder."""
        named = os.environ.get("BITATLAS_HOME", "").strip()
        return cls(Path(named).expanduser().absolute() if named else _platform_folder())

    def folder(self, *parts: str) -> Path:
        """A folder below the root, made if missing.

        Raises:
            UserError: it cannot be made (read-only, no permission, disk full, a file is in the way).
        """
        path = self.root.joinpath(*parts)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise disk_error(e, path) from None
        return path

    def check_writable(self) -> None:
        """Raises `UserError` unless a file can be made in the root folder."""
        root = self.folder()
        try:
            with tempfile.TemporaryFile(dir=root) as probe:
                probe.write(b"x")
        except OSError as e:
            raise disk_error(e, root) from None

    @property
    def db(self) -> Path:
        """The results file (DuckDB). Never open() it; see `cache.connect`."""
        return self.root / "bitatlas.duckdb"

    @property
    def jobs_db(self) -> Path:
        """The job state (SQLite, used by DBOS)."""
        return self.root / "jobs.sqlite"

    def runs(self, run: str) -> Path:
        """Folder of a run's part files."""
        return self.folder("runs", run)

    def logs(self, job: str) -> Path:
        """Log file of a job."""
        return self.folder("logs") / f"{job}.log"

    @property
    def artifacts(self) -> Path:
        """Quantised candidates and calibration statistics."""
        return self.folder("artifacts")

    @property
    def parquet(self) -> Path:
        """Copies of finished results, from which the results file can be made again."""
        return self.folder("parquet")

    @property
    def models(self) -> Path:
        """Imported checkpoints."""
        return self.folder("models")


def write_output(path: str | Path, data: bytes) -> None:
    """`atomic_write` of a file that the user named; ``~`` is the home folder.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    atomic_write(Path(path).expanduser().resolve(), data, named=True)


def atomic_write(path: Path, data: bytes, *, named: bool = False) -> None:
    """Write a whole file or nothing: ``.tmp`` beside it, flushed to disk, then renamed over it.

    ``named``: the user named this file; an error then is not about the data folder.

    Raises:
        UserError: disk full, read-only, not permitted; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):  # what made it fail may also hide the file
            temporary.unlink(missing_ok=True)
        raise disk_error(e, path, named=named) from None
