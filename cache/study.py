"""Reading copies back: rebuild the results file, load a shipped study, ship one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.cache.arrays import Arrays, read_arrays
from bitatlas.cache.arrow import DAMAGE, insert
from bitatlas.cache.copies import Copies, read_table
from bitatlas.cache.frontier_file import decode_frontier
from bitatlas.cache.models import Models, index_from, insert_model
from bitatlas.cache.paths import disk_error
from bitatlas.cache.plans import CANDIDATES, Plans, insert_allocation, insert_frontier
from bitatlas.cache.runs import RunInfo, Runs, insert_run
from bitatlas.cache.verifications import Verifications, insert_verification

__all__ = ["Studies", "load_folder", "restore"]

log = logging.getLogger(__name__)


def _model(con: Any, path: Path, model_path: str | None) -> None:
    table, head = read_table(path)
    index = index_from(head, table.to_pydict())
    insert_model(con, index if model_path is None else replace(index, path=model_path))


def _run(con: Any, path: Path) -> None:
    table, head = read_table(path)
    steps = head.pop("steps")
    info = RunInfo(**{**head, "formats": tuple(head["formats"]), "steps": 0})
    insert(con, "damage", table.select(DAMAGE.names).cast(DAMAGE))
    columns = {
        "run": [info.run] * len(steps),
        "step": steps,
        "stamp": [info.finished or info.started] * len(steps),
    }
    insert(
        con,
        "steps",
        pa.table(columns, schema=pa.schema([("run", "string"), ("step", "string"), ("stamp", "double")])),
    )
    insert_run(con, info)


def _candidates(con: Any, path: Path) -> None:
    table, _ = read_table(path)
    insert(con, "candidates", table.select(CANDIDATES.names).cast(CANDIDATES))


def _allocation(con: Any, path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    insert_allocation(con, Allocation.from_json(json.dumps(data["allocation"])), float(data["at"]))


def _verification(con: Any, path: Path) -> None:
    insert_verification(con, json.loads(path.read_text(encoding="utf-8")))


def _frontier(con: Any, path: Path) -> None:
    body = path.read_bytes()
    note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    insert_frontier(con, path.stem, note["model"], note["run"], note["at"], decode_frontier(body), body)


def _arrays(con: Any, path: Path) -> None:
    read_arrays(path)  # they stay files; only sound ones are taken over


def load_folder(con: Any, root: Path, model_path: str | None = None, strict: bool = True) -> dict[str, int]:
    """Load every copy below ``root`` through an open connection; what is known already stays.

    Args:
        con: an open read-write connection.
        root: folder of copies.
        model_path: where the models of the folder lie now; None keeps the recorded path.
        strict: False skips files that cannot be read (with a log line) instead of raising.

    Returns:
        kind -> number of files loaded.

    Raises:
        UserError: a file that cannot be read, when strict.
    """
    copies = Copies(root)
    loaders: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
        "models": (".parquet", lambda c, p: _model(c, p, model_path)),
        "runs": (".parquet", _run),
        "candidates": (".parquet", _candidates),
        "arrays": (".npz", _arrays),
        "allocations": (".json", _allocation),
        "verifications": (".json", _verification),
        "frontiers": (".npz", _frontier),
    }
    done = dict.fromkeys(loaders, 0)
    for kind, (ending, load) in loaders.items():
        for path in copies.files(kind, ending):
            try:
                load(con, path)
                done[kind] += 1
            except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                if strict:
                    raise UserError(
                        "the study folder has a file that cannot be read", found=f"{path}: {e}"
                    ) from None
                log.warning("skipped %s: %s", path, e)
    return done


def restore(root: Path) -> Callable[[Any], None]:
    """What `Database` calls after damage: load the copies below ``root``, skipping bad ones."""

    def load(con: Any) -> None:
        load_folder(con, root, strict=False)

    return load


class Studies(Models, Runs, Plans, Verifications, Arrays):
    """`import_study`, `export_study`."""

    def import_study(self, folder: Path, model_path: str | None = None) -> dict[str, int]:
        """Load a shipped study folder; harmless when repeated. Returns kind -> number of files.

        Args:
            folder: as written by `export_study`.
            model_path: where the model of the study lies on this machine.

        Raises:
            UserError: not a study folder, or a file in it that cannot be read; then nothing is loaded.
        """
        if not any(Copies(folder).files("models", ".parquet")):
            raise UserError("this is not a study folder", found=f"no models/*.parquet in {folder}")
        with self.db.write() as con:
            done = load_folder(con, folder, model_path)
        # The safety copy must know the study too, or a rebuild would forget it.
        for kind in done:
            for path in (folder / kind).glob("*"):
                self._copy(path, self.copies.root / kind / path.name)
        return done

    def export_study(self, model_digest: str, folder: Path) -> int:
        """Write everything finished about one model into ``folder``; returns the number of files.

        The model's path stays out of it. Raises `UserError` for an unknown model.
        """
        target = Copies(folder)
        index = self.model(model_digest)
        target.model(replace(index, path=index.name))
        runs = [r.run for r in self.runs(model_digest) if r.finished is not None]
        names = {(kind, f"{r}.parquet") for r in runs for kind in ("runs", "candidates")}
        names |= {("arrays", f"{r}.npz") for r in runs}
        names |= {("allocations", f"{a.id}.json") for a in self.allocations(model_digest)}
        names |= {("verifications", f"{v['id']}.json") for v in self.verifications(model_digest)}
        for f in self.frontiers(model_digest):
            names |= {("frontiers", f"{f['id']}.npz"), ("frontiers", f"{f['id']}.json")}
        written = 1
        for kind, name in sorted(names):
            source = self.copies.root / kind / name
            if source.exists():
                self._copy(source, folder / kind / name)
                written += 1
        return written

    def _copy(self, source: Path, target: Path) -> None:
        if source.resolve() == target.resolve() or source.suffix == ".tmp":
            return
        temporary = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary)
            temporary.replace(target)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise disk_error(e, target) from None
