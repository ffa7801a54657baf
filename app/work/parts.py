"""What a step leaves behind: one .npz per step, whole or absent."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from bitatlas.analysis.measure import part_path
from bitatlas.cache.paths import atomic_write

__all__ = ["load_part", "save_part"]


def save_part(folder: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a step.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(part_path(folder, key), buffer.getvalue())


def load_part(folder: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a step; None when they are missing or damaged (the step is then run again)."""
    try:
        with np.load(part_path(folder, key), allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
