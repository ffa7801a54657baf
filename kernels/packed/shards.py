"""safetensors shards, written and read by our own few lines: offsets known beforehand, nothing trusted.

Writing: the space is claimed first, tensors are written at their offsets as they come, and the file gets its name only
when it is whole and on disk. Tensors with wide elements come first, so that every one is aligned.
Reading: the header is checked completely before any byte of data is read, and data is read, not mapped.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from bitatlas.kernels.errors import UserError

__all__ = ["CODES", "DTYPES", "ShardReader", "TensorSpec", "write_shard"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor in a shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(path: Path, specs: Iterable[TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write a shard that holds exactly ``specs``; returns the size of the file in bytes.

    ``tensors`` is drained one by one, in any order; only one needs to be in memory.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
        ValueError: a tensor that was not announced, announced otherwise, or missing.
    """
    ordered = sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, tuple[TensorSpec, int]] = {}
    at = 0
    for s in ordered:
        header[s.name] = {
            "dtype": CODES[s.dtype],
            "shape": list(s.shape),
            "data_offsets": [at, at + s.nbytes],
        }
        offsets[s.name] = (s, at)
        at += s.nbytes
    if len(offsets) != len(ordered):
        raise ValueError(f"two tensors of {path.name} have the same name")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, start + at)  # a full disk shows before the work, not after
            f.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors:
                spec, offset = offsets.pop(name)
                if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                    raise ValueError(
                        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec.dtype} {spec.shape}"
                    )
                if spec.nbytes:
                    f.seek(start + offset)
                    f.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if offsets:
                raise ValueError(f"{len(offsets)} tensors of {path.name} are missing, such as {min(offsets)}")
            f.truncate(start + at)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: {path.name} needs {start + at} bytes",
                            found=f"{_free(path.parent)} bytes free in {path.parent}",
                            fix="free some space, then run the same command again; finished shards stay") from None  # fmt: skip
        raise UserError(f"{path} cannot be written", found=str(e.strerror or e)) from None
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    return start + at


def _free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


class ShardReader:
    """A shard, opened and checked. A context manager.

    Raises:
        UserError: the file is missing, not a regular file, truncated, or its header is not what it must be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise UserError(f"{path.name} cannot be read", found=str(e.strerror)) from None
        try:
            self.start, self.tensors = self._header()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def _bad(self, found: str) -> UserError:
        return UserError(
            f"{self.path.name} is not a sound safetensors file", found=found, fix="pack the model again"
        )

    def _header(self) -> tuple[int, dict[str, tuple[TensorSpec, int]]]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little") if size >= 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise self._bad(f"a header of {length} bytes in a file of {size}")
        try:
            data = json.loads(os.pread(self._fd, length, 8))
        except (ValueError, RecursionError) as e:
            raise self._bad(f"the header is not JSON: {e}") from None
        if not isinstance(data, dict):
            raise self._bad("the header is not a table")
        rows = []
        for name, row in data.items():
            if name != "__metadata__":
                rows.append(self._row(name, row))
        rows.sort(key=lambda r: (r[1], r[0].nbytes))
        at = 0
        for spec, begin in rows:
            if begin != at:
                raise self._bad(f"{spec.name} starts at {begin}, {at} was expected (a gap or an overlap)")
            at += spec.nbytes
        if 8 + length + at != size:
            raise self._bad(f"{size} bytes, {8 + length + at} were announced")
        return 8 + length, {spec.name: (spec, begin) for spec, begin in rows}

    def _row(self, name: str, row: object) -> tuple[TensorSpec, int]:
        if not isinstance(row, Mapping) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{name}: {str(row)[:60]}")
        shape, offsets = row["shape"], row["data_offsets"]
        ints = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not ints or not all(type(v) is int and v >= 0 for v in (*shape, *offsets)):
            raise self._bad(f"{name}: shape {str(shape)[:40]}, offsets {str(offsets)[:40]}")
        if row["dtype"] not in DTYPES:
            raise self._bad(f"{name} has the dtype {str(row['dtype'])[:20]!r}")
        spec = TensorSpec(name, DTYPES[row["dtype"]], tuple(shape))
        if offsets[1] - offsets[0] != spec.nbytes:
            raise self._bad(f"{name} takes {offsets[1] - offsets[0]} bytes, its shape says {spec.nbytes}")
        return spec, offsets[0]

    def expect(self, specs: Iterable[TensorSpec]) -> None:
        """Raises `UserError` unless the shard holds exactly these tensors."""
        want = {s.name: s for s in specs}
        have = {name: spec for name, (spec, _) in self.tensors.items()}
        if want != have:
            odd = sorted(n for n in {*want, *have} if want.get(n) != have.get(n))
            raise self._bad(f"{len(odd)} tensors differ from the manifest, such as {odd[0]}")

    def read(self, name: str) -> Tensor:
        """A tensor, freshly read."""
        spec, begin = self.tensors[name]
        raw = torch.empty(spec.nbytes, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        while done < spec.nbytes:
            count = os.preadv(self._fd, [view[done : done + (1 << 30)]], self.start + begin + done)
            if count <= 0:
                raise self._bad(f"{name} ends after {done} of {spec.nbytes} bytes")
            done += count
        return raw.view(spec.dtype).view(spec.shape)
