"""Models in: where a name leads, and what is inside."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import FORMATS, ModelIndex, UserError
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["confine", "confine_text", "fit_length", "locate", "model_roots", "open_index", "register", "scan"]

log = logging.getLogger("bitatlas")


def model_roots() -> tuple[Path, ...]:
    """Folders below which the browser may open models."""
    from bitatlas.app.tasks.demo import demo_path

    raw = os.environ.get("BITATLAS_MODEL_ROOTS", "")
    roots = [Path(p) for p in raw.split(os.pathsep) if p] or [Path.cwd()]
    return tuple(p.resolve() for p in (*roots, Home.default().models, demo_path()))


def confine(path: str | Path) -> Path:
    """The real path of a model that a browser named.

    Raises:
        UserError: it leads outside the model roots (links followed).
    """
    real = Path(path).expanduser().resolve()
    roots = model_roots()
    if not any(real == root or root in real.parents for root in roots):
        raise UserError(
            "this folder is outside the model roots",
            found=str(real),
            fix=f"start with BITATLAS_MODEL_ROOTS={real.parent} bitatlas serve; roots now: {', '.join(map(str, roots))}",
        )
    return real


def confine_text(named: str) -> str | Path:
    """A calibration text that a browser named: ``self`` and ``datasets:NAME`` as they are, a file's real path.

    Raises:
        UserError: a file, or a local folder instead of a data set's name, outside the model roots.
    """
    if named == "self" and not Path(named).exists():
        return named
    name = named.removeprefix("datasets:").partition(":")[0]
    # The library would also open a folder of that name, which is not the browser's to choose.
    if (
        named.startswith("datasets:")
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){0,2}", name)
        and not Path(name).exists()
    ):
        return named
    return confine(named)


def locate(model: str | Path) -> Path:
    """The folder or GGUF file that a model's name stands for: ``demo``, a path, or a hub id.

    Raises:
        UserError: nothing is there.
    """
    from bitatlas.app.tasks.demo import demo_path

    name = str(model)
    if name == "demo":
        return demo_path()
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name)
    raise UserError(
        "there is no such model",
        found=name,
        fix="name a checkpoint folder, a .gguf file, a hub id (org/name) or `demo`",
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt"]  # a pickle never lands on disk
    try:
        return Path(snapshot_download(name, allow_patterns=wanted)).resolve()
    except Exception as error:  # noqa: BLE001 - the hub client raises a zoo of types; all mean the same here
        raise UserError(
            f"{name} is neither a folder here nor a model that could be fetched",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="check the name, the network, and HF_TOKEN for gated models",
        ) from None


def open_index(model: str | Path) -> ModelIndex:
    """Units of a checkpoint from its headers alone; no torch, no weights."""
    from bitatlas.analysis.model_index import index_model

    return index_model(locate(model))


def register(model: str | Path) -> ModelIndex:
    """`open_index`, remembered in the store so that pages and `export` find the model by its digest."""
    index = open_index(model)
    Store(Home.default()).put_model(index)
    return index


def fit_length(index: ModelIndex, seq_len: int) -> None:
    """Say on the log where sequences are longer than what the model was made for.

    Raises:
        UserError: it cannot read them at all.
    """
    from bitatlas.analysis.context_length import check_length

    if note := check_length(index, seq_len):
        log.warning("note: %s", note)


def scan(model: str | Path) -> dict[str, Any]:
    """What `bitatlas scan` prints: units, roles, experts, shapes, parameters, bytes per format."""
    index = open_index(model)
    roles: dict[str, dict[str, Any]] = {}
    for u in index.units:
        name = f"{u.role} (expert)" if u.expert >= 0 else u.role
        row = roles.setdefault(name, {"role": name, "units": 0, "params": 0, "shapes": {}})
        row["units"] += 1
        row["params"] += u.params
        row["shapes"].setdefault(f"{u.rows}x{u.cols}")
    formats = list(FORMATS.values())
    sizes = index.bytes_table(formats).sum(axis=0)
    return {
        "name": index.name,
        "path": index.path,
        "digest": index.digest,
        "architecture": index.architecture,
        "model_type": index.model_type,
        "layers": index.n_layers,
        "experts": index.n_experts,
        "top_k": index.top_k,
        "units": len(index.units),
        "params": index.params,
        "kept_tensors": len(index.kept),
        "kept_bytes": index.kept_bytes,
        "notes": list(index.notes),
        "roles": [{**r, "shapes": list(r["shapes"])} for r in roles.values()],
        "formats": [
            {"name": f.name, "bytes": int(b), "bits_per_weight": float(b) * 8 / index.params}
            for f, b in zip(formats, sizes)
        ],
        "unit_list": [
            {
                "unit": u.key,
                "role": u.role,
                "layer": u.layer,
                "expert": u.expert,
                "rows": u.rows,
                "cols": u.cols,
            }
            for u in index.units
        ],
    }
