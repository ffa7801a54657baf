"""Copies of finished results as plain files, from which the results file can be made again.

One folder, the same for the safety copy (``$BITATLAS_HOME/parquet``) and for a study that is shipped::

    models/<digest>.parquet   runs/<run>.parquet   candidates/<run>.parquet
    allocations/<id>.json     verifications/<id>.json     frontiers/<id>.npz     arrays/<run>.npz
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bitatlas.analysis.schema import Allocation, Frontier, ModelIndex, UserError
from bitatlas.cache.frontier_file import encode_frontier
from bitatlas.cache.paths import atomic_write

if TYPE_CHECKING:
    from bitatlas.cache.runs import RunInfo

__all__ = ["Copies", "KEY", "read_table"]

KEY = b"bitatlas"


def read_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A Parquet file of ours: its table and the JSON in its header.

    Raises:
        UserError: not such a file.
    """
    try:
        table = pq.read_table(path)
        return table.replace_schema_metadata(None), json.loads((table.schema.metadata or {})[KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as e:
        raise UserError(
            "this copy cannot be read", found=f"{path.name}: {e}", fix="remove the file"
        ) from None


class Copies:
    """Writes copies below ``root``; each file whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _parquet(self, kind: str, name: str, table: pa.Table, head: dict[str, Any]) -> None:
        out = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({KEY: json.dumps(head)}), out, compression="zstd")
        atomic_write(self.root / kind / f"{name}.parquet", out.getvalue().to_pybytes())

    def _json(self, kind: str, name: str, data: dict[str, Any]) -> None:
        text = json.dumps(data, indent=1, sort_keys=True) + "\n"
        atomic_write(self.root / kind / f"{name}.json", text.encode())

    def model(self, index: ModelIndex) -> None:
        """Copy of a model index."""
        from bitatlas.cache.models import head_of, units_table

        self._parquet("models", index.digest, units_table(index), head_of(index))

    def run(self, info: RunInfo, steps: list[str], rows: pa.Table) -> None:
        """Copy of a run: description and steps in the header, rows in the table."""
        self._parquet("runs", info.run, rows, {**asdict(info), "steps": steps})

    def candidates(self, run: str, rows: pa.Table) -> None:
        """Copy of a run's candidates."""
        self._parquet("candidates", run, rows, {"run": run})

    def allocation(self, key: str, allocation: Allocation, at: float) -> None:
        """Copy of an allocation: the allocation file itself in an envelope with its time."""
        self._json("allocations", key, {"at": at, "allocation": json.loads(allocation.to_json())})

    def verification(self, key: str, data: dict[str, Any]) -> None:
        """Copy of a verification."""
        self._json("verifications", key, data)

    def frontier(self, key: str, model: str, run: str, at: float, frontier: Frontier) -> None:
        """Copy of a frontier."""
        atomic_write(self.root / "frontiers" / f"{key}.npz", encode_frontier(frontier))
        self._json("frontiers", key, {"model": model, "run": run, "at": at})

    def files(self, kind: str, ending: str) -> Iterator[Path]:
        """Copies of a kind, by name; unfinished ``.tmp`` files are not among them."""
        yield from sorted((self.root / kind).glob(f"*{ending}"))
