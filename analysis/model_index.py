"""The index of a checkpoint: its units, from headers and config.json alone. Torch-free, < 2 s for 20 000 tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitatlas.analysis.checkpoint import CheckpointFiles
from bitatlas.analysis.context_length import positions
from bitatlas.analysis.families import ROLE_ORDER, Place, classify
from bitatlas.analysis.kv_geometry import config_int, kv_geometry
from bitatlas.analysis.safetensors_header import TensorInfo, open_regular
from bitatlas.analysis.schema import KeptTensor, ModelIndex, QuantUnit
from bitatlas.kernels.errors import UserError

__all__ = [
    "build_index",
    "index_model",
    "is_mxfp4",
    "matrix_shape",
    "model_digest",
    "sampled_digest",
    "scale_of",
]

_BLOCKS, _BLOCK_BYTES = 16, 64 << 10
_MAX_UNITS = 1_000_000
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_READABLE_QUANT = {"fp8", "mxfp4"}
_MXFP4 = "_blocks"
_ROLE_RANK = {role: i for i, role in enumerate(ROLE_ORDER)}


def index_model(path: str | Path) -> ModelIndex:
    """Units and kept tensors of a checkpoint folder or a GGUF file.

    Raises:
        UserError: anything `CheckpointFiles.open` refuses, a checkpoint that is already quantised, no units at all.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from bitatlas.analysis.gguf_names import index_gguf

        return index_gguf(path)
    files = CheckpointFiles.open(path)
    config = files.text_config
    quant = files.config.get("quantization_config") or config.get("quantization_config")
    method = str(quant.get("quant_method", "?")) if isinstance(quant, dict) else ""
    if method and method not in _READABLE_QUANT:
        raise UserError(
            f"the checkpoint is already quantised ({method})", found="quantization_config in config.json",
            fix="take the original bf16, fp16 or fp8 checkpoint that it was made from",
        )  # fmt: skip
    copies = _tied_copies(files) if config.get("tie_word_embeddings") is True else set()
    return build_index(
        files.folder, config, (info for name, (_, info) in files.tensors.items() if name not in copies),
        model_digest(files), name=_model_name(files.folder), architecture=_architecture(files.config),
        notes=list(files.notes),
    )  # fmt: skip


def build_index(
    path: Path, config: dict[str, Any], tensors: Iterable[TensorInfo], digest: str, *, name: str,
    architecture: str, notes: list[str], source: str = "safetensors",
) -> ModelIndex:  # fmt: skip
    """The index of these tensors under this (text) config.

    Raises:
        UserError: none of the tensors can be quantised.
    """
    model_type = str(config.get("model_type", ""))
    n_layers, hidden = config_int(config, "layers"), config_int(config, "hidden")
    infos = {t.name: t for t in tensors}
    scales = {s for t in infos if (s := scale_of(t, infos))}
    units: list[QuantUnit] = []
    kept: list[KeptTensor] = []
    beyond = 0
    for t in infos.values():
        if t.name in scales:
            continue  # Belongs to its weight; what replaces the weight replaces it too.
        name_of, shape = t.name.removesuffix(_MXFP4) if is_mxfp4(t) else t.name, matrix_shape(t)
        place = classify(name_of, shape, model_type, hidden) if t.dtype in _FLOATS or is_mxfp4(t) else None
        if place and is_mxfp4(t):
            place = replace(place, transposed=False)  # MXFP4 blocks always run along the input
        if place and n_layers and place.layer >= n_layers:
            place, beyond = None, beyond + 1
        if place is None:
            kept.append(KeptTensor(t.name, t.shape, t.dtype, t.nbytes))
        else:
            units += _units(t, place)
        if len(units) > _MAX_UNITS:
            raise UserError(
                "the checkpoint has too many experts to be read safely", found=f"{t.name}: {t.shape}"
            )
    if not units:
        raise UserError("the checkpoint has no weight matrix that could be quantised",
                        found=f"{len(kept)} tensors, such as {', '.join(k.name for k in kept[:3])}")  # fmt: skip
    units.sort(key=_order)
    roles = {u.role for u in units}
    notes = list(notes)
    if "embed" in roles and "head" not in roles:
        notes.append("the head is tied to the embedding: one unit, under the embedding's name")
    if scales:
        notes.append(
            f"{len(scales)} weights are stored in fp8 or MXFP4 with scales; they are read dequantised"
        )
    if beyond:
        notes.append(
            f"{beyond} tensors belong to layers beyond the model's {n_layers} (extra prediction heads); kept"
        )
    if "linear" in roles:
        odd = [u.key for u in units if u.role == "linear"]
        notes.append(f"{len(odd)} matrices have no known role and count as plain linears, such as {odd[0]}")
    embed = next((u for u in units if u.role == "embed"), None)
    longest, learned = positions(config, kept)
    return ModelIndex(
        path=str(path), digest=digest, name=name, architecture=architecture, model_type=model_type,
        units=tuple(units), kept=tuple(kept),
        n_layers=n_layers or 1 + max(u.layer for u in units),
        n_experts=1 + max(u.expert for u in units),
        top_k=config_int(config, "top_k") if any(u.expert >= 0 for u in units) else 0,
        kv=kv_geometry(config), vocab_size=embed.rows if embed else config_int(config, "vocab"),
        source=source, notes=tuple(notes), positions=longest, learned_positions=learned,
    )  # fmt: skip


def _tied_copies(files: CheckpointFiles) -> set[str]:
    """Heads that are stored although they are the embedding: same shape, same bytes in all sampled blocks."""
    heads = [n for n in files.tensors if n.endswith("lm_head.weight")]
    embeds = [
        n for n, (_, t) in files.tensors.items() if (p := classify(n, t.shape, "")) and p.role == "embed"
    ]
    copies = set()
    for head in heads:
        shard, info = files.tensors[head]
        for other_shard, other in (files.tensors[e] for e in embeds):
            if (info.shape, info.dtype) == (other.shape, other.dtype) and sampled_digest(
                files.folder / shard, info.nbytes, info.start
            ) == sampled_digest(files.folder / other_shard, other.nbytes, other.start):
                copies.add(head)
    return copies


def scale_of(name: str, names: Container[str]) -> str:
    """Name of the scale tensor of an fp8 or MXFP4 weight ``name`` among ``names``, "" when it has none."""
    if name.endswith(_MXFP4):
        candidates = [name.removesuffix(_MXFP4) + "_scales"]
    else:
        candidates = [name + "_scale_inv", name + "_scale"]
    return next((c for c in candidates if c in names), "")


def is_mxfp4(t: TensorInfo) -> bool:
    """Whether these are MXFP4 blocks of stacked experts: (experts, rows, groups, 16) bytes, as gpt-oss stores them."""
    return t.dtype == "U8" and t.name.endswith(_MXFP4) and len(t.shape) == 4 and t.shape[3] == 16


def matrix_shape(t: TensorInfo) -> tuple[int, ...]:
    """The shape of the weights in a stored tensor: its own, or (experts, rows, 32 groups) for MXFP4 blocks."""
    return (*t.shape[:2], 32 * t.shape[2]) if is_mxfp4(t) else t.shape


def _units(t: TensorInfo, place: Place) -> list[QuantUnit]:
    """The units inside one tensor: one, or one or two per expert of a stack."""
    key = t.name.removesuffix(_MXFP4 if is_mxfp4(t) else ".weight")
    if not place.stacked:
        rows, cols = t.shape[::-1] if place.transposed else t.shape
        return [
            QuantUnit(
                key, place.role, place.layer, place.expert, rows, cols, t.name, transposed=place.transposed
            )
        ]
    experts, a, b = matrix_shape(t)
    rows, cols = (b, a) if place.transposed else (a, b)
    out = []
    for e in range(experts):
        if place.role != "gate_up":
            out.append(
                QuantUnit(f"{key}[{e}]", place.role, place.layer, e, rows, cols, t.name, "", place.transposed)
            )
            continue
        for part in ("gate", "up"):
            out.append(QuantUnit(f"{key}[{e}].{part}", part, place.layer, e, rows // 2, cols, t.name, part,
                                 place.transposed, place.interleaved))  # fmt: skip
    return out


def _order(u: QuantUnit) -> tuple[int, int, int, int, str]:
    """Embedding, blocks in order (attention, dense or expert MLPs, shared experts), head."""
    if u.layer < 0:
        segment = {"embed": -1, "head": 1 << 30}.get(u.role, 1 << 29)
    else:
        segment = u.layer
    shared = u.role.startswith("shared_")
    return (
        segment,
        2 if shared else int(u.expert >= 0),
        u.expert,
        _ROLE_RANK.get(u.role, len(ROLE_ORDER)),
        u.key,
    )


def _model_name(folder: Path) -> str:
    """The folder's name; for a snapshot in the hub cache the repository's."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rsplit("--", 1)[1]
    return folder.name


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def model_digest(files: CheckpointFiles) -> str:
    """Content key of a checkpoint: sha256 over the config, every header, and sampled blocks of every shard.

    Of each shard 16 evenly spaced blocks of 64 KiB are read, so a 60 GB checkpoint costs some tens of MB. Two
    checkpoints that differ only between the sampled blocks get the same key: training, merging and rounding touch
    every block; an edit by hand may not.
    """
    h = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for name, header in files.shards.items():
        h.update(f"{name}\0{header.sha256}\0{header.file_size}\0".encode())
        h.update(sampled_digest(files.folder / name, header.file_size))
    return h.hexdigest()


def sampled_digest(path: Path, size: int, start: int = 0) -> bytes:
    """sha256 of evenly spaced blocks of ``size`` bytes of a file, the first and the last block included."""
    h = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as f:
        if size <= _BLOCKS * _BLOCK_BYTES:
            f.seek(start)
            h.update(f.read(size))
            return h.digest()
        for i in range(_BLOCKS):
            f.seek(start + (size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
            h.update(f.read(_BLOCK_BYTES))
    return h.digest()
