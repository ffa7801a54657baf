"""Where every tensor of a packed checkpoint will lie: known before the first byte is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitatlas.analysis.schema import ModelIndex

if TYPE_CHECKING:
    from bitatlas.kernels.packed.manifest import Manifest

__all__ = ["SHARD_BYTES", "as_begun", "plan_packing", "shard_size"]

SHARD_BYTES = 256 << 20
_PARTS = 32  # a shard is a step: what a job shows as progress, and what it loses when it is killed
_LEAST = 64 << 10  # below it a file costs more than what is in it


def shard_size(total: int) -> int:
    """Bytes of the largest shard of ``total`` bytes: about a 32nd, from 64 KiB to 256 MiB."""
    return min(SHARD_BYTES, max(_LEAST, total // _PARTS))


def plan_packing(
    index: ModelIndex, formats: Mapping[str, str], *, quantizer: str, model: Mapping[str, str],
    wide: Collection[str] = (), shard_bytes: int | None = None,
) -> Manifest:  # fmt: skip
    """The manifest of the checkpoint ``index`` in ``formats`` (unit key -> format name).

    Args:
        index, formats: what is packed, and how.
        quantizer, model: as they are noted.
        wide: kept tensors that are stored as float32 whatever they were.
        shard_bytes: largest shard; None = `shard_size` of the whole. A tensor is never split.
    """
    from bitatlas.kernels.packed.manifest import Manifest, PackedKept, PackedUnit, plan_shards

    units = [
        PackedUnit(u.key, u.tensor, u.rows, u.cols, formats[u.key], u.expert, u.part, u.transposed, u.interleaved)
        for u in index.units
    ]  # fmt: skip
    kept = [
        PackedKept(k.name, k.shape, "F32", 4 * math.prod(k.shape))
        if k.name in wide
        else PackedKept(k.name, k.shape, k.dtype, k.nbytes)
        for k in index.kept
    ]
    total = sum(u.nbytes for u in units) + sum(k.nbytes for k in kept)
    return Manifest(
        *plan_shards(units, kept, shard_bytes or shard_size(total)),
        quantizer=quantizer,
        model=dict(model),
    )


def as_begun(planned: Manifest, out: Path) -> Manifest:
    """``planned``, or the same packing in other shards where ``out`` holds that: it was begun with another shard size.

    Raises:
        UserError: ``out`` is a file or a folder of something else, or its manifest is damaged.
    """
    from bitatlas.kernels.packed.manifest import Manifest
    from bitatlas.kernels.packed.writer import check_folder

    name = check_folder(out)
    if not name:
        return planned
    found = Manifest.from_json((out / name).read_text(encoding="utf-8"))
    return found if _whole(found) == _whole(planned) else planned


def _whole(manifest: Manifest) -> Manifest:
    """The manifest without its division into shards."""
    return replace(
        manifest,
        units=tuple(replace(u, shard=0) for u in manifest.units),
        kept=tuple(replace(k, shard=0) for k in manifest.kept),
        shards=(),
    )
