"""A job's checkpoint: still the one that was asked for, and one that can be loaded (GGUF is imported once)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import ModelIndex, UserError
from bitatlas.cache.paths import Home

__all__ = ["loadable", "unchanged"]

log = logging.getLogger("bitatlas")


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


def unchanged(params: Mapping[str, Any]) -> ModelIndex:
    """The index of a job's model (``model``, ``digest``); sequences longer than it was made for are noted in the job's log.

    Raises:
        UserError: the checkpoint is not the one that the job was submitted for, or has no positions for its sequences.
    """
    from bitatlas.analysis.context_length import check_length
    from bitatlas.analysis.model_index import index_model

    index = index_model(params["model"])
    if index.digest != params["digest"]:
        raise UserError(
            "the checkpoint changed since this job was submitted",
            found=f"digest {index.digest[:12]}, the job is for {params['digest'][:12]}",
            fix="submit it again, for the checkpoint as it is now",
        )
    if note := check_length(index, int(params.get("seq_len") or 0)):
        log.warning("note: %s", note)
    return index
