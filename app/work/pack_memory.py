"""What a quantiser that sees inputs takes of the memory: known before the model is loaded, refused where it cannot fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bitatlas.analysis.schema import ModelIndex, QuantUnit, UserError
from bitatlas.app.sizes import format_bytes

if TYPE_CHECKING:
    from bitatlas.analysis.weights import WeightReader

__all__ = ["check_memory", "free_memory", "needed_memory", "statistics_limit"]

_LIBRARIES = 200 << 20  # transformers and what it imports
_BATCH_TOKENS = 1024  # of one forward pass (`analysis.input_stats`)
_CGROUP = Path("/sys/fs/cgroup")


def statistics_limit(index: ModelIndex) -> int:
    """Bytes of input statistics held at once: a quarter of what the model takes, from 64 to 256 MiB."""
    return min(max(index.params, 1 << 26), 1 << 28)


def needed_memory(reader: WeightReader, rounded: list[QuantUnit]) -> int:
    """Bytes at the peak, roughly (SmolLM2 with GPTQ: within a tenth).

    The model lies in memory as float32, because inputs in fewer bits would give other codes than those that `verify`
    judges. While it is loaded, tensors of other types are held as they were stored, too.
    """
    index = reader.index
    names = {u.tensor for u in index.units} | {k.name for k in index.kept}
    tensors = [info for name, (_, info) in reader.files.tensors.items() if name in names]
    model = 4 * (index.params + sum(math.prod(k.shape) for k in index.kept))
    loading = sum(info.nbytes for info in tensors if info.dtype != "F32")
    seen = [u for u in rounded if u.role != "embed"]
    widest = max((u.cols for u in seen), default=0)
    largest = max((u.rows * u.cols for u in seen), default=0)
    logits = index.vocab_size if any(u.layer < 0 for u in seen) else 0
    # A unit with its codes, and the inverse of its second moments in double precision.
    work = 16 * largest + 24 * widest**2 + 8 * _BATCH_TOKENS * logits
    return _LIBRARIES + model + max(loading, statistics_limit(index) + work)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may still take: what the machine has, and what its container leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" is no number
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return free


def check_memory(quantizer: str, need: int) -> None:
    """Raises `UserError` when ``need`` bytes are more than there are."""
    free = free_memory()
    if need > free:
        raise UserError(
            f"there is too little memory to pack with {quantizer} and a calibration text",
            found=f"about {format_bytes(need)} needed (the model as float32, statistics, working space), {format_bytes(free)} free",
            fix="--quantizer rtn, which reads one matrix at a time, or end other programs, or pack on a larger machine",
        )
