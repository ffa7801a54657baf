"""Launch settings measured on a GPU, as data: ``tuned/<gpu>.json``, read at the first launch on that GPU.

A file is a list of rows {bits, group (0 = the whole row), n, k, m, tile, splits}; ``m`` is the smallest power of two that is
not below the rows of the input. Written by ``benchmarks/gpu_kernels.py --tune``. ``$BITATLAS_TUNED`` names another folder.
Importing this touches no GPU.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

__all__ = ["Launch", "bucket", "folder", "launch", "read", "slug"]

_Key = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Launch:
    """Rows of x, rows of W and columns in one step; over how many programs the columns are split."""

    tile: tuple[int, int, int]
    splits: int


def folder() -> Path:
    """Where the files lie."""
    return Path(os.environ.get("BITATLAS_TUNED") or Path(__file__).with_name("tuned"))


def slug(gpu: str) -> str:
    """The file name of a GPU: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def bucket(m: int) -> int:
    """The smallest power of two that is not below ``m``."""
    return 1 << max(m - 1, 0).bit_length()


@cache
def read(path: Path) -> dict[_Key, Launch]:
    """The rows of a file by (bits, group, n, k, m); none when it is missing, or a row is no setting that can be launched."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        out = {}
        for r in rows:
            tile = tuple(int(t) for t in r["tile"])
            group = int(r["group"])
            sound = (
                len(tile) == 3 and all(t >= 16 and t & (t - 1) == 0 for t in tile) and int(r["splits"]) > 0
            )
            if not sound or (group and group % tile[2]):
                raise ValueError(r)
            key = (int(r["bits"]), group, int(r["n"]), int(r["k"]), int(r["m"]))
            out[key] = Launch((tile[0], tile[1], tile[2]), int(r["splits"]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # untuned is slower, never wrong
    return out


def launch(device: torch.device, bits: int, group: int | None, n: int, k: int, m: int) -> Launch | None:
    """The measured settings for this product, if there are any."""
    if device.type != "cuda":
        return None
    table = read(folder() / f"{slug(torch.cuda.get_device_name(device))}.json")
    return table.get((bits, group or 0, n, k, bucket(m)))
