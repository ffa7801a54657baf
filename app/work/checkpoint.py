"""A checkpoint that can be loaded: a GGUF file becomes a safetensors folder in the data folder, once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitatlas.analysis.schema import ModelIndex
from bitatlas.cache.paths import Home

__all__ = ["loadable"]


def loadable(index: ModelIndex, home: Home) -> ModelIndex:
    """``index`` itself for safetensors; for GGUF the index of the imported folder (same units, same keys)."""
    if index.source != "gguf":
        return index
    from bitatlas.analysis.gguf_import import import_gguf
    from bitatlas.analysis.model_index import index_model

    folder = Path(home.models) / f"{index.name}-{index.digest[:12]}"
    if not (folder / "config.json").exists():
        import_gguf(index.path, folder)
    # Everything that is kept names the model by the file that the person named.
    return replace(index_model(folder), digest=index.digest, name=index.name)
