"""What allocations really did on held-out text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.cache.keys import canonical, digest
from bitatlas.cache.part import Part

__all__ = ["Verifications", "insert_verification"]

_TEXT = ("id", "allocation", "model_digest", "text_digest")
_NUMBERS = ("kl_mean", "kl_p50", "kl_p99", "kl_stderr", "flips", "ppl_before", "ppl_after", "floor")
_COLUMNS = (*_TEXT, "tokens", *_NUMBERS, "sequences")


def insert_verification(con: Any, data: Mapping[str, Any]) -> None:
    """Insert a verification that has its id; a known one stays."""
    extra = {k: v for k, v in data.items() if k not in _COLUMNS and k != "at"}
    # JSON has no NaN, so an unknown number is null in a copy and NaN here.
    numbers = [float("nan") if data.get(k) is None else float(data[k]) for k in _NUMBERS]
    con.execute(
        f"INSERT INTO verifications VALUES ({', '.join('?' * 16)}) ON CONFLICT DO NOTHING",
        [*(str(data.get(k, "")) for k in _TEXT), int(data["tokens"]), *numbers,
         canonical(data.get("sequences") or []), canonical(extra), float(data["at"])],
    )  # fmt: skip


class Verifications(Part):
    """`put_verification`, `verifications`."""

    def put_verification(self, data: Mapping[str, Any]) -> str:
        """Store a verification; returns its key.

        Args:
            data: ``model_digest``, ``allocation`` (key), ``text_digest``, ``tokens``; ``kl_mean``, ``kl_p50``,
                ``kl_p99``, ``kl_stderr`` in nats per token, ``flips`` as a share, ``ppl_before``, ``ppl_after``,
                ``floor``; ``sequences``: a list, one entry a sequence; whatever else, JSON-able.
                ``settings`` is part of the key: the same question asked again is the same row.

        Raises:
            UserError: one of the first four is missing.
        """
        missing = [k for k in ("model_digest", "allocation", "text_digest", "tokens") if k not in data]
        if missing:
            raise UserError("the verification is incomplete", found=f"no {', '.join(missing)}")
        asked = {k: data.get(k) for k in ("model_digest", "allocation", "text_digest", "tokens", "settings")}
        full = json.loads(canonical({**data, "id": digest(asked), "at": data.get("at", time.time())}))
        with self.db.write() as con:
            insert_verification(con, full)
        self.copies.verification(full["id"], full)
        return str(full["id"])

    def verifications(
        self, model_digest: str | None = None, allocation: str | None = None
    ) -> list[dict[str, Any]]:
        """Verifications (of a model, of an allocation), newest first, as the dicts that were put."""
        where, values = [], []
        for column, value in (("model", model_digest), ("allocation", allocation)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        sql = (
            "SELECT * FROM verifications"
            + (" WHERE " + " AND ".join(where) if where else "")
            + " ORDER BY stamp DESC"
        )
        with self.db.read() as con:
            rows = con.execute(sql, values).fetchall()
        out = []
        for row in rows:
            data = dict(zip(_COLUMNS, row[: len(_COLUMNS)]))
            data["sequences"] = json.loads(data["sequences"])
            out.append({**data, **json.loads(row[-2]), "at": row[-1]})
        return out
