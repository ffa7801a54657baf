"""Arrays that stay with a finished run: files beside its copy, too large or too odd for a table."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.cache.part import Part
from bitatlas.cache.paths import atomic_write

__all__ = ["Arrays", "read_arrays"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, without pickles.

    Raises:
        UserError: a damaged file.
        FileNotFoundError: no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            return {name: z[name] for name in z.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError("this file of a run cannot be read", found=f"{path.name}: {e}",
                        fix="remove the file, then measure again") from None  # fmt: skip


class Arrays(Part):
    """`put_arrays`, `arrays`."""

    def put_arrays(self, run: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a run (nothing when there are none), replacing those that were there."""
        if arrays:
            out = io.BytesIO()
            np.savez_compressed(out, **dict(arrays))  # type: ignore[arg-type]
            atomic_write(self._arrays_file(run), out.getvalue())

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """The arrays of a run by name; empty when it has none.

        Raises:
            UserError: they were kept and are damaged.
        """
        try:
            return read_arrays(self._arrays_file(run))
        except FileNotFoundError:
            return {}

    def _arrays_file(self, run: str) -> Path:
        return self.copies.root / "arrays" / f"{run}.npz"
