"""Launch settings measured on a GPU, as data: ``tuned/<gpu>.json``, read at the first launch on that GPU.

A file is a list of rows, each of a kind (``what``; ``linear`` where it is left out):
    linear     {bits, group (0 = the whole row), n, k, m, tile, splits}: the fused product
    many_rows  {bits, n, k, rows}: from so many rows of the input on, dequantising and a dense product win
    experts    {n, k, m, block, rows}: pairs and rows of W in a tile of the grouped product; m = mean pairs of an expert
    kv         {k_bits, v_bits, dim, heads, tokens, chunk, tile}: decode attention; heads = batch times K/V heads
Sizes that vary (m, heads, tokens; n and k of ``many_rows``) are classes: the smallest power of two that is not below. Written
by ``benchmarks/gpu_kernels.py --tune``. ``$BITATLAS_TUNED`` names another folder. Importing this touches no GPU.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Launch",
    "bucket",
    "experts",
    "folder",
    "key_of",
    "kv_chunk",
    "launch",
    "many_rows",
    "read",
    "slug",
]

_Key = tuple[str | int, ...]
_KEYS = {
    "linear": ("bits", "group", "n", "k", "m"),
    "many_rows": ("bits", "n", "k"),
    "experts": ("n", "k", "m"),
    "kv": ("k_bits", "v_bits", "dim", "heads", "tokens"),
}


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


def key_of(row: Mapping[str, Any]) -> _Key:
    """What a row of a file is found by: its kind, then its sizes.

    Raises:
        KeyError, TypeError, ValueError: an unknown kind, or a size that is none.
    """
    what = row.get("what", "linear")
    return (what, *(int(row[k]) for k in _KEYS[what]))


def _power(value: int, least: int = 16) -> int:
    if value < least or value & (value - 1):
        raise ValueError(f"{value} is no tile")
    return value


def _setting(row: Mapping[str, Any]) -> Launch | tuple[int, int] | int:
    """What a row says; ValueError where it cannot be launched."""
    what = row.get("what", "linear")
    if what == "many_rows":
        return _power(int(row["rows"]), 1)
    if what == "experts":
        return _power(int(row["block"])), _power(int(row["rows"]))
    if what == "kv":
        chunk, tile = int(row["chunk"]), _power(int(row["tile"]))
        if chunk <= 0 or chunk % tile:
            raise ValueError(f"{chunk} tokens are not whole steps of {tile}")
        return chunk, tile
    m, n, k = (_power(int(t)) for t in row["tile"])
    group, splits = int(row["group"]), int(row["splits"])
    if splits < 1 or (group and group % k):
        raise ValueError(f"{splits} splits, {k} columns in groups of {group}")
    return Launch((m, n, k), splits)


@cache
def read(path: Path) -> dict[_Key, Launch | tuple[int, int] | int]:
    """The rows of a file by `key_of`; none when it is missing, or a row is no setting that can be launched."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {key_of(r): _setting(r) for r in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # untuned is slower, never wrong


@cache
def _path(device: torch.device, _folder: str | None) -> Path:
    """Looked up once: every launch asks."""
    return folder() / f"{slug(torch.cuda.get_device_name(device))}.json"


def _find(device: torch.device, *key: str | int) -> Any:
    if device.type != "cuda":
        return None
    return read(_path(device, os.environ.get("BITATLAS_TUNED"))).get(key)


def launch(device: torch.device, bits: int, group: int | None, n: int, k: int, m: int) -> Launch | None:
    """The measured settings for the fused product of (m, k) with a packed (n, k), if there are any."""
    return _find(device, "linear", bits, group or 0, n, k, bucket(m))


def many_rows(device: torch.device, bits: int, n: int, k: int) -> int | None:
    """From how many rows of the input on dequantising wins, if that was measured for weights of about this size."""
    return _find(device, "many_rows", bits, bucket(n), bucket(k))


def experts(device: torch.device, n: int, k: int, pairs: int, count: int) -> tuple[int, int] | None:
    """Pairs and rows of W in a tile, for ``pairs`` chosen pairs among ``count`` experts of (n, k), if measured."""
    return _find(device, "experts", n, k, bucket(-(-pairs // max(count, 1))))


def kv_chunk(
    device: torch.device, bits: tuple[int, int], dim: int, heads: int, tokens: int
) -> tuple[int, int] | None:
    """Packed tokens of one program and of one step of it, for K and V of ``bits``, if measured."""
    return _find(device, "kv", *bits, dim, bucket(heads), bucket(tokens))
