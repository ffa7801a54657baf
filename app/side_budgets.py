"""Limits beside the bytes, as columns for a solver: latency, bit operations, bytes read per decoding step.

An expert counts for what routing makes of it: with k of E experts per token and a batch of B, an expert is read in a share
1 - (1 - k/E)^B of the steps, and multiplies k/E of the tokens. An embedding is looked up, one row a token, unless it also
is the head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.analysis.schema import FORMATS, ModelIndex, QuantUnit, UserError, parse_format
from bitatlas.app.sizes import parse_bytes
from bitatlas.cache.paths import Home
from bitatlas.solvers import SideBudget

__all__ = ["LATENCY_SCHEMA", "SideLimits", "active_bytes", "bit_operations", "latency", "read_latency"]

LATENCY_SCHEMA = "bitatlas/latency/1"
_ACTIVATION_BITS = 16


def _shares(index: ModelIndex, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(U,) share of the steps in which a unit is read, and share of the tokens that it multiplies."""
    tied = not any(u.role == "head" for u in index.units)
    chosen = index.top_k / index.n_experts if index.n_experts else 1.0
    read, used = [], []
    for u in index.units:
        look_up = u.role == "embed" and not tied
        share = chosen if u.expert >= 0 else 0.0 if look_up else 1.0
        used.append(share)
        read.append(min(1.0, batch / u.rows) if look_up else 1 - (1 - share) ** batch)
    return np.array(read), np.array(used)


def active_bytes(index: ModelIndex, formats: Sequence[str], batch: int = 1) -> np.ndarray:
    """(U, F) expected bytes of each unit that one decoding step of ``batch`` sequences reads."""
    return index.bytes_table([parse_format(f) for f in formats]) * _shares(index, batch)[0][:, None]


def bit_operations(index: ModelIndex, formats: Sequence[str]) -> np.ndarray:
    """(U, F) bit operations per token, MACs x weight bits x activation bits (HAWQ-V3, arXiv 2011.10680, section 3.3)."""
    params = np.array([u.params for u in index.units]) * _shares(index, 1)[1]
    return params[:, None] * np.array([FORMATS[f].bits for f in formats]) * _ACTIVATION_BITS


def read_latency(home: Home, file: Path | None = None) -> dict[str, Any]:
    """The kernel table of this machine, or that in ``file``.

    Raises:
        UserError: never measured, or not such a table.
    """
    path = file or home.root / "latency.json"
    if file is not None and not path.is_file():
        raise UserError(
            "there is no such latency table", found=str(path), fix="make one with bench-kernels --out"
        )
    if not path.is_file():
        raise UserError("the kernels of this machine have not been timed", found=f"no {path}",
                        fix="bitatlas bench-kernels MODEL")  # fmt: skip
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert data["schema"] == LATENCY_SCHEMA
        for row in data["rows"]:
            ok = (
                row["format"] in FORMATS and row["us"] > 0 and min(row["rows"], row["cols"], row["batch"]) > 0
            )
            assert ok
            assert np.isfinite(row["us"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(
            "this is not a latency table", found=str(path), fix="make one with bench-kernels --out"
        ) from None
    return data


def latency(index: ModelIndex, formats: Sequence[str], table: dict[str, Any], batch: int = 1) -> np.ndarray:
    """(U, F) expected microseconds of each unit in one decoding step of ``batch`` sequences.

    A shape that was not timed is interpolated: microseconds linear in the number of weights, per format.

    Raises:
        UserError: a format or batch that the table does not have.
    """
    found: dict[tuple[str, int, int], float] = {}
    for row in table["rows"]:
        if row["batch"] == batch:
            found[row["format"], row["rows"], row["cols"]] = float(row["us"])
    lacking = sorted(set(formats) - {f for f, _, _ in found})
    if lacking:
        raise UserError(f"the latency table has no {lacking[0]} at batch {batch}", found=f"it is of {table.get('device')}",
                        fix=f"bitatlas bench-kernels {index.path} --batch {batch} --formats {','.join(formats)}")  # fmt: skip
    lines = {f: _line([(r * c, us) for (g, r, c), us in found.items() if g == f]) for f in formats}
    share = _shares(index, batch)[0]

    def of(u: QuantUnit, f: str) -> float:
        a, b = lines[f]
        return found.get((f, u.rows, u.cols), a + b * u.params)

    return np.array([[of(u, f) for f in formats] for u in index.units]) * share[:, None]


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(intercept, slope), neither negative, of microseconds over weights."""
    n, us = np.array(points, float).T
    if len(set(n)) == 1:
        return 0.0, float(us.mean() / n[0])
    slope = max(float(np.polyfit(n, us, 1)[0]), 0.0)
    return max(float((us - slope * n).mean()), 0.0), slope


@dataclass(frozen=True, slots=True)
class SideLimits:
    """What was asked for: milliseconds, 10^9 bit operations per token, bytes read per step; None = no limit."""

    latency_ms: float | None = None
    bops: float | None = None
    active_bytes: str | int | None = None
    batch: int = 1

    def budgets(self, index: ModelIndex, formats: Sequence[str]) -> tuple[SideBudget, ...]:
        """One `SideBudget` per limit.

        Raises:
            UserError: a limit that is not positive, no table of latencies.
        """
        for name, value in (("latency", self.latency_ms), ("bops", self.bops), ("batch", self.batch)):
            if value is not None and not value > 0:
                raise UserError(f"the limit on {name} must be positive", found=str(value))
        out = []
        if self.latency_ms is not None:
            cost = latency(index, formats, read_latency(Home.default()), self.batch)
            out.append(
                SideBudget("latency in microseconds", cost, self.latency_ms * 1e3, "--latency-ms", 1e3)
            )
        if self.bops is not None:
            out.append(
                SideBudget(
                    "bit operations per token", bit_operations(index, formats), self.bops * 1e9, "--bops", 1e9
                )
            )
        if self.active_bytes is not None:
            cost = active_bytes(index, formats, self.batch)
            out.append(
                SideBudget(
                    "active bytes per step", cost, float(parse_bytes(self.active_bytes)), "--active-bytes"
                )
            )
        return tuple(out)

    def settings(self) -> dict[str, Any]:
        """For the provenance."""
        asked = {"latency_ms": self.latency_ms, "bops": self.bops, "active_bytes": self.active_bytes}
        return {"side": {k: v for k, v in asked.items() if v is not None} | {"batch": self.batch}}
