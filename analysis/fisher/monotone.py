"""Damage never grows with bits: formats that differ in bits only, and the nearest monotone sequence. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitatlas.kernels.formats import parse_format

__all__ = ["isotonic", "make_monotone", "monotone_families"]


def monotone_families(formats: Sequence[str]) -> list[list[int]]:
    """Positions of formats that differ in bits only (same group size and symmetry), fewest bits first."""
    families: dict[tuple[object, ...], list[int]] = {}
    for i, name in enumerate(formats):
        fmt = parse_format(name)
        families.setdefault((fmt.kind, fmt.group_size, fmt.symmetric), []).append(i)
    return [sorted(m, key=lambda i: parse_format(formats[i]).bits) for m in families.values() if len(m) > 1]


def isotonic(values: np.ndarray) -> np.ndarray:
    """Nearest non-increasing sequence in least squares (pool adjacent violators), 1-D."""
    blocks: list[list[float]] = []
    for v in values:
        blocks.append([float(v), 1.0])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            mean, weight = blocks.pop()
            total = blocks[-1][1] + weight
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * weight) / total, total]
    return np.concatenate([np.full(int(w), m) for m, w in blocks]) if blocks else np.zeros(0)


def make_monotone(value: np.ndarray, formats: Sequence[str]) -> np.ndarray:
    """(U, F) damages made non-increasing in bits inside every family, on the log scale; rows with a zero stay."""
    out = value.copy()
    for members in monotone_families(formats):
        part = value[:, members]
        for i in np.flatnonzero((np.diff(part, axis=1) > 0).any(1)):
            if (part[i] > 0).all():
                out[i, members] = np.exp(isotonic(np.log(part[i])))
    return out
