"""GGUF files: index under the names that the imported checkpoint will have."""

from __future__ import annotations

from pathlib import Path

from bitatlas.analysis.schema import ModelIndex
from bitatlas.kernels.errors import UserError

__all__ = ["index_gguf"]


def index_gguf(path: Path) -> ModelIndex:
    """Index of a GGUF file."""
    raise UserError("GGUF files are not read yet", found=str(path))
