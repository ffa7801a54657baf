"""Arrays of many steps put together: probes by rows (sequence, draw), units by columns. NumPy only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.kernels.errors import UserError

__all__ = ["Joined", "join_parts", "pack_names"]

NAMES = "names"
NO_PROBES = "no_probes"
"""Mark of parts that hold something else than projections."""


def pack_names(units: Sequence[str], formats: Sequence[str]) -> np.ndarray:
    """Unit and format names as bytes that an npz file can hold."""
    return np.frombuffer(json.dumps([list(units), list(formats)]).encode(), np.uint8)


@dataclass(frozen=True)
class Joined:
    """Everything that the steps of a run left behind.

    Attributes:
        units: (U,) keys in the index's order; formats: (F,) names.
        a: (S, U, F) float32; gsq: (S, U) float64; reached: (S, U) int64; norm_sq: (U, F) float64.
        sequence, draw: (S,) int64; tokens: (S,) float64, weight of the sequence's positions.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    a: np.ndarray
    gsq: np.ndarray
    reached: np.ndarray
    norm_sq: np.ndarray
    sequence: np.ndarray
    draw: np.ndarray
    tokens: np.ndarray

    def rows(self, keep: np.ndarray) -> Joined:
        """Only some of the probes, (S,) bool."""
        return Joined(self.units, self.formats, self.a[keep], self.gsq[keep], self.reached[keep], self.norm_sq,
                      self.sequence[keep], self.draw[keep], self.tokens[keep])  # fmt: skip


def join_parts(parts: Mapping[str, Mapping[str, np.ndarray]]) -> Joined:
    """One matrix from the parts: each holds some probes of some units; a cell that two parts hold is the same in both.

    Raises:
        UserError: cells are missing (a run that was not finished).
    """
    rows: dict[tuple[int, int], float] = {}
    place: dict[str, int] = {}
    formats: tuple[str, ...] = ()
    for key in parts:
        part = parts[key]
        units, names = json.loads(bytes(part[NAMES]))
        formats = tuple(names)
        place |= {u: int(p) for u, p in zip(units, _place(part, len(units)))}
        rows |= dict(zip(_row_keys(part), part["tokens"].tolist()))
    order = sorted(place, key=lambda u: place[u])
    column = {u: i for i, u in enumerate(order)}
    row = {key: i for i, key in enumerate(sorted(rows))}
    shape = len(row), len(order)
    a = np.full((*shape, len(formats)), np.nan, np.float32)
    gsq, reached = np.zeros(shape), np.zeros(shape, np.int64)
    norm_sq = np.zeros((len(order), len(formats)))
    for key in parts:
        part = parts[key]
        at = [column[u] for u in json.loads(bytes(part[NAMES]))[0]]
        norm_sq[at] = part["norm_sq"]
        where = [row[k] for k in _row_keys(part)]
        if where:
            a[np.ix_(where, at)] = part["a"]
            gsq[np.ix_(where, at)] = part["gsq"]
            reached[np.ix_(where, at)] = part["reached"]
    if np.isnan(a).any() or not len(row):
        raise UserError("the probes are incomplete", found=f"{int(np.isnan(a).any(2).sum())} of {a[:, :, 0].size} missing",
                        fix="resume the measurement")  # fmt: skip
    keys = sorted(rows)
    return Joined(
        tuple(order), formats, a, gsq, reached, norm_sq, np.array([k[0] for k in keys], np.int64),
        np.array([k[1] for k in keys], np.int64), np.array([rows[k] for k in keys], np.float64),
    )  # fmt: skip


def _place(part: Mapping[str, np.ndarray], units: int) -> np.ndarray:
    return part["place"] if "place" in part else np.arange(units)


def _row_keys(part: Mapping[str, np.ndarray]) -> list[tuple[int, int]]:
    """(sequence, draw) of each row; draws are counted off where they were not written down."""
    if "draw" in part:
        return list(zip(part["sequence"].tolist(), part["draw"].tolist()))
    seen: dict[int, int] = {}
    out = []
    for s in part["sequence"].tolist():
        seen[s] = seen.get(s, -1) + 1
        out.append((s, seen[s]))
    return out
