"""Allocations, frontiers and the candidates that searches tried."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bitatlas.analysis.schema import Allocation, Frontier, UserError
from bitatlas.cache.arrow import insert
from bitatlas.cache.frontier_file import decode_frontier, encode_frontier
from bitatlas.cache.keys import canonical, digest
from bitatlas.cache.part import Part

__all__ = ["Candidate", "PlanInfo", "Plans", "allocation_id", "insert_allocation", "insert_frontier"]


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """One stored allocation, without its unit table."""

    id: str
    model_digest: str
    metric: str
    solver: str
    bits_per_weight: float
    weights_bytes: int
    predicted: float
    at: float

    @property
    def label(self) -> str:
        """``3.500 bits, mckp on fisher (1a2b3c4d)``: how an allocation is called in menus."""
        return (
            f"{self.bits_per_weight:.3f} bits, {self.solver} on {self.metric or 'no metric'} ({self.id[:8]})"
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One evaluated whole allocation of a search.

    Attributes:
        choice_hash: digest of the choice; objective: what the search minimises.
        payload_bytes: its size; tokens: what evaluating it cost; extra: anything else, JSON-able.
    """

    choice_hash: str
    objective: float
    payload_bytes: int = 0
    tokens: int = 0
    extra: dict[str, Any] | None = None


CANDIDATES = pa.schema(
    [("run", pa.string()), ("choice_hash", pa.string()), ("objective", pa.float64()),
     ("payload_bytes", pa.int64()), ("tokens", pa.int64()), ("extra", pa.string()), ("stamp", pa.float64())]
)  # fmt: skip


def allocation_id(allocation: Allocation) -> str:
    """Content key of an allocation: equal files, equal key."""
    return digest(allocation.to_json())


def insert_allocation(con: Any, allocation: Allocation, at: float) -> str:
    """Insert an allocation; a known one stays. Returns its key."""
    key = allocation_id(allocation)
    con.execute(
        "INSERT INTO allocations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [key, allocation.model_digest, allocation.metric, allocation.solver, allocation.bits_per_weight,
         allocation.weights_bytes, allocation.predicted, zlib.compress(allocation.to_json().encode()), at],
    )  # fmt: skip
    return key


def insert_frontier(
    con: Any, key: str, model: str, run: str, at: float, frontier: Frontier, body: bytes
) -> None:
    """Insert a frontier; a known one stays."""
    con.execute(
        "INSERT INTO frontiers VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [key, model, frontier.metric, frontier.solver, run, body, at],
    )


class Plans(Part):
    """`put_allocation`, `allocation`, `allocations`, `put_frontier`, `frontier`, `frontiers`, candidates."""

    def put_allocation(self, allocation: Allocation) -> str:
        """Store an allocation; returns its content key."""
        at = time.time()
        with self.db.write() as con:
            key = insert_allocation(con, allocation, at)
        self.copies.allocation(key, allocation, at)
        return key

    def allocation(self, key: str) -> Allocation:
        """One allocation.

        Raises:
            UserError: no such allocation.
        """
        with self.db.read() as con:
            found = con.execute("SELECT body FROM allocations WHERE id = ?", [key]).fetchall()
        if not found:
            raise UserError("there is no such allocation in the store", found=key, fix="bitatlas solve")
        return Allocation.from_json(zlib.decompress(found[0][0]).decode())

    def allocations(self, model_digest: str | None = None) -> list[PlanInfo]:
        """Stored allocations (of one model), newest first."""
        where, values = ("WHERE model = ?", [model_digest]) if model_digest else ("", [])
        with self.db.read() as con:
            rows = con.execute(
                f"""SELECT id, model, metric, solver, bits_per_weight, weights_bytes, predicted, stamp
                    FROM allocations {where} ORDER BY stamp DESC""",
                values,
            ).fetchall()
        return [PlanInfo(*row) for row in rows]

    def put_frontier(self, model_digest: str, frontier: Frontier, run: str = "", key: str = "") -> str:
        """Store a frontier that was made from ``run``; returns its key: ``key`` of the question, or one of its content."""
        body, at = encode_frontier(frontier), time.time()
        key = key or digest(
            {"model": model_digest, "run": run, "metric": frontier.metric, "solver": frontier.solver,
             "formats": frontier.formats, "bytes": frontier.payload_bytes.tolist(),
             "choice": zlib.crc32(frontier.choice.tobytes())}
        )  # fmt: skip
        with self.db.write() as con:
            insert_frontier(con, key, model_digest, run, at, frontier, body)
        self.copies.frontier(key, model_digest, run, at, frontier)
        return key

    def frontier(self, key: str) -> Frontier:
        """One frontier.

        Raises:
            UserError: no such frontier.
        """
        found = self.find_frontier(key)
        if found is None:
            raise UserError("there is no such frontier in the store", found=key, fix="bitatlas frontier")
        return found

    def find_frontier(self, key: str) -> Frontier | None:
        """The frontier of a key, None when there is none."""
        with self.db.read() as con:
            found = con.execute("SELECT body FROM frontiers WHERE id = ?", [key]).fetchall()
        return decode_frontier(found[0][0]) if found else None

    def frontiers(self, model_digest: str) -> list[dict[str, Any]]:
        """Stored frontiers of a model, newest first: id, metric, solver, run, at."""
        with self.db.read() as con:
            rows = con.execute(
                "SELECT id, metric, solver, run, stamp FROM frontiers WHERE model = ? ORDER BY stamp DESC",
                [model_digest],
            ).fetchall()
        return [dict(zip(("id", "metric", "solver", "run", "at"), row)) for row in rows]

    def put_candidates(self, run: str, candidates: Sequence[Candidate]) -> int:
        """Store evaluated candidates of a search; known ones stay. Returns the number of new ones."""
        if not candidates:
            return 0
        table = pa.table(
            {
                "run": [run] * len(candidates),
                "choice_hash": [c.choice_hash for c in candidates],
                "objective": [float(c.objective) for c in candidates],
                "payload_bytes": [int(c.payload_bytes) for c in candidates],
                "tokens": [int(c.tokens) for c in candidates],
                "extra": [canonical(c.extra or {}) for c in candidates],
                "stamp": [time.time()] * len(candidates),
            },
            schema=CANDIDATES,
        )
        with self.db.write() as con:
            return insert(con, "candidates", table)

    def candidates(self, run: str) -> list[Candidate]:
        """Candidates of a search, best first; unknown objectives last."""
        with self.db.read() as con:
            rows = con.execute(
                """SELECT choice_hash, objective, payload_bytes, tokens, extra FROM candidates WHERE run = ?
                   ORDER BY isnan(objective), objective, choice_hash""",
                [run],
            ).fetchall()
        return [Candidate(h, o, b, t, json.loads(extra)) for h, o, b, t, extra in rows]
