"""The logit-difference Gram of a `logit_gram` run: whole allocations from single flips with all cross terms. NumPy only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitatlas.kernels.errors import UserError

__all__ = ["LogitGramMatrix", "load_gram", "pack_flips"]


def pack_flips(names: Sequence[tuple[str, str]]) -> np.ndarray:
    """(unit, format) of every flip as bytes that an npz file can hold."""
    return np.frombuffer(json.dumps([list(n) for n in names]).encode(), np.uint8)


@dataclass(frozen=True)
class LogitGramMatrix:
    """Sketches of the logit differences of every flip.

    Attributes:
        units: (U,) keys; formats: (F,) names.
        sketch: (R, U, F) float32; products of two flips keep their value to about 1/sqrt(R) of the norms.
        own: (U, F) float64, half the squared norm per token without sketching: the KL of the flip to second order.
        tokens: tokens behind it.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    sketch: np.ndarray
    own: np.ndarray
    tokens: int

    def score(
        self, choices: np.ndarray, *, shrinkage: float = 1.0, damage: np.ndarray | None = None
    ) -> np.ndarray:
        """Predicted KL of whole allocations, nats per token: sum of the flips + shrinkage x cross terms, never below zero.

        Args:
            choices: (N, U) index into formats.
            damage: (U, F) to use for the single flips instead of `own`.
        """
        u = np.arange(len(self.units))
        table = self.own if damage is None else np.where(np.isfinite(damage), damage, self.own)
        out = np.empty(len(choices))
        for i, choice in enumerate(np.atleast_2d(choices)):
            picked = self.sketch[:, u, choice]  # (R, U)
            total = picked.sum(1, dtype=np.float64)
            alone = float((picked.astype(np.float64) ** 2).sum())
            out[i] = table[u, choice].sum() + shrinkage * (total @ total - alone) / (2 * self.tokens)
        return np.maximum(out, 0.0)


def load_gram(parts_dir: str | Path) -> LogitGramMatrix:
    """The sketches of a finished `logit_gram` run, from its part files.

    Raises:
        UserError: the folder holds none, or not every unit in every format.
    """
    columns: dict[tuple[str, str], np.ndarray] = {}
    own: dict[tuple[str, str], float] = {}
    tokens = 0
    for path in sorted(Path(parts_dir).glob("*.npz")):
        with np.load(path, allow_pickle=False) as data:
            if {"sketch", "own", "flips"} <= set(data.files):
                names = [tuple(n) for n in json.loads(bytes(data["flips"]))]
                columns |= dict(zip(names, data["sketch"]))
                own |= dict(zip(names, data["own"].tolist()))
                tokens = int(data["tokens"])
    units, formats = (tuple(dict.fromkeys(n[i] for n in columns)) for i in (0, 1))
    if not columns or len(columns) != len(units) * len(formats):
        raise UserError("there are no sketches of every unit in every format here", found=f"{len(columns)} in {parts_dir}",
                        fix="bitatlas measure MODEL --metric logit_gram")  # fmt: skip
    size = len(next(iter(columns.values())))
    sketch = np.empty((size, len(units), len(formats)), np.float32)
    table = np.empty((len(units), len(formats)))
    for i, unit in enumerate(units):
        for f, name in enumerate(formats):
            sketch[:, i, f] = columns[unit, name]
            table[i, f] = own[unit, name]
    return LogitGramMatrix(units, formats, sketch, table, tokens)
