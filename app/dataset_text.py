"""Calibration text out of the `datasets` library: ``datasets:NAME[/CONFIG][:SPLIT[:FIELD]]``, written once as JSON lines.

``datasets:`` reads what this machine already has; only ``download-datasets:`` may use the network.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.cache.paths import Home, atomic_write

__all__ = ["PREFIXES", "dataset_file"]

_LOCAL, _DOWNLOAD = "datasets:", "download-datasets:"
PREFIXES = (_LOCAL, _DOWNLOAD)
_MOST_BYTES = 32 << 20  # several times what the largest calibration reads


def dataset_file(named: str) -> Path:
    """JSON lines with the data set's text, below the data folder; made on first use.

    Raises:
        UserError: the library is not installed, the data set is not on this machine, or it has no such split or field.
    """
    prefix = next(p for p in PREFIXES if named.startswith(p))
    rest = named.removeprefix(prefix)
    name, split, field = ([*rest.split(":"), "", ""])[:3]
    split, field = split or "train", field or "text"
    path = Home.default().folder("texts") / f"{hashlib.sha256(rest.encode()).hexdigest()[:20]}.jsonl"
    if path.exists():
        return path
    if importlib.util.find_spec("datasets") is None:
        raise UserError("reading a data set needs the `datasets` library", found="it is not installed",
                        fix="pip install datasets, or save the text as a .txt or .jsonl file")  # fmt: skip
    lines, size = [], 0
    for record in _load(name, split, download=prefix == _DOWNLOAD):
        if field not in record:
            raise UserError(
                f"the data set has no field {field!r}",
                found=", ".join(record),
                fix=f"{prefix}{name}:{split}:FIELD",
            )
        if str(record[field]).strip():
            lines.append(json.dumps({"text": str(record[field])}))
            size += len(lines[-1])
        if size > _MOST_BYTES:
            break
    if not lines:
        raise UserError("the data set holds no text", found=f"{name}, split {split}, field {field}")
    atomic_write(path, ("\n".join(lines) + "\n").encode())
    return path


def _load(name: str, split: str, *, download: bool) -> Any:
    """The records of one split; ``NAME/CONFIG`` where the name has more parts than an owner and a name."""
    before = os.environ.get("HF_DATASETS_OFFLINE")
    if not download:
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the library is imported
    try:
        datasets = importlib.import_module("datasets")
        owner, _, config = name.rpartition("/")
        attempts = [(name, None)] + ([(owner, config)] if owner else [])
        for i, (dataset, part) in enumerate(attempts):
            try:
                return datasets.load_dataset(dataset, part, split=split)
            except Exception as e:  # noqa: BLE001 - the library raises a zoo of types; all mean the same here
                if i + 1 == len(attempts):
                    how = "check the name" if download else f"name {_DOWNLOAD}{name} to allow a download"
                    raise UserError(f"the data set {name} could not be read", found=f"{type(e).__name__}: {str(e)[:200]}",
                                    fix=f"{how}, or save its text as a file") from None  # fmt: skip
    finally:
        if before is None:
            os.environ.pop("HF_DATASETS_OFFLINE", None)
        else:
            os.environ["HF_DATASETS_OFFLINE"] = before
    return []
