"""The header of a safetensors file, read with bounds of our own before any library maps the file. Torch-free.

Layout: 8 bytes little-endian length n, n bytes of JSON, then the data, without gap, overlap or trailing bytes.
The safetensors library checks the layout but spends seconds and gigabytes on a header bomb and takes duplicate
keys; so size, counts and nesting are bounded here before anything is parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitatlas.kernels.errors import UserError

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "MAX_TENSORS",
    "Header",
    "TensorInfo",
    "open_regular",
    "read_header",
]

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 200_000
_MAX_DIMS = 8

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F64": 64,
     "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
     "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype as in the header, shape, and its bytes' absolute place in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        path: the file.
        tensors: name -> place, in file order.
        metadata: the ``__metadata__`` strings.
        file_size, mtime_ns: as seen when the header was read; a later difference means the file changed.
        sha256: of the header's bytes (length field included).
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_size: int
    mtime_ns: int
    sha256: str


def open_regular(path: Path) -> int:
    """A read-only file descriptor of a regular file; never blocks on a FIFO, never opens a device.

    Raises:
        UserError: it is missing, unreadable, or not a regular file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path.name} is not a regular file", found="a folder, FIFO, socket or device")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as e:
        raise UserError(f"{path.name} cannot be opened", found=e.strerror or str(e)) from None
    # The name may have been swapped between stat and open; what was opened decides.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path.name} is not a regular file", found="it changed while it was opened")
    return descriptor


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file; not a byte of data is touched.

    Raises:
        UserError: missing, not a regular file, truncated, a header beyond `MAX_HEADER_BYTES` or `MAX_TENSORS`,
            not JSON, duplicate names, an unknown dtype, a shape that disagrees with its bytes, overlapping
            tensors, gaps, trailing bytes.
    """
    path = Path(path)
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as f:
        status = os.fstat(f.fileno())
        size = status.st_size
        prefix = f.read(8)
        if len(prefix) < 8:
            raise UserError(f"{path.name} is truncated", found=f"{size} bytes, less than the 8 of the length field",
                            fix="download the file again")  # fmt: skip
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"the header of {path.name} is too large to be read safely",
                found=f"it claims {length} bytes, the limit is {MAX_HEADER_BYTES}",
                fix="check that this is a safetensors file; split it into shards if it really has that many tensors",
            )
        if 8 + length > size:
            raise UserError(f"{path.name} is truncated", found=f"a header of {length} bytes in a file of {size}",
                            fix="download the file again")  # fmt: skip
        raw = f.read(length)
    entries = _parse(raw, path.name)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"the metadata of {path.name} are not strings", found=str(metadata)[:80])
    tensors = _tensors(entries, path.name, 8 + length, size)
    digest = hashlib.sha256(prefix + raw).hexdigest()
    return Header(path, tensors, metadata, size, status.st_mtime_ns, digest)


def _parse(raw: bytes, name: str) -> dict[str, Any]:
    """JSON of the header. Counts are bounded on the bytes, before the parser builds objects of them."""
    for token, limit in ((b"{", MAX_TENSORS + 2), (b'"', 12 * MAX_TENSORS), (b",", 12 * MAX_TENSORS)):
        if (count := raw.count(token)) > limit:
            raise UserError(
                f"the header of {name} has too many entries to be read safely",
                found=f"{count} times {token.decode()!r}; at most {MAX_TENSORS} tensors are read from one file",
            )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise UserError(f"the header of {name} names something twice", found=repr(twice[:120]))
        return out

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UserError:
        raise
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise UserError(f"the header of {name} is not JSON", found=str(e)[:120],
                        fix="check that this is a safetensors file; download it again") from None  # fmt: skip
    if not isinstance(data, dict):
        raise UserError(f"the header of {name} is not a JSON object", found=type(data).__name__)
    return data


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensors(entries: dict[str, Any], name: str, base: int, size: int) -> dict[str, TensorInfo]:
    """Checked places: dtype known, product of the shape = bytes, and together exactly the data section."""
    found: list[TensorInfo] = []
    for key, entry in entries.items():
        where = f"tensor {key[:120]!r} of {name}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise UserError(f"{where} lacks dtype, shape and data_offsets", found=str(entry)[:120])
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise UserError(f"{where} has an unknown dtype", found=repr(dtype)[:60])
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_natural, shape)):
            raise UserError(f"{where} has an impossible shape", found=str(shape)[:120])
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
            raise UserError(f"{where} has impossible offsets", found=str(offsets)[:120])
        start, end = base + offsets[0], base + offsets[1]
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if end < start or bits != 8 * (end - start):
            raise UserError(
                f"{where}: shape and bytes disagree",
                found=f"{dtype} {shape} needs {bits / 8:g} bytes, the offsets {offsets} give {end - start}",
            )
        if end > size:
            raise UserError(f"{name} is truncated", found=f"{where} ends at byte {end} of {size}",
                            fix="download the file again")  # fmt: skip
        found.append(TensorInfo(key, dtype, tuple(shape), start, end))
    found.sort(key=lambda t: (t.start, t.end))
    at = base
    for t in found:
        if t.start != at:
            kind = "overlaps the tensor before it" if t.start < at else "leaves a gap before it"
            raise UserError(
                f"tensor {t.name[:120]!r} of {name} {kind}", found=f"starts at {t.start}, expected {at}"
            )
        at = t.end
    if at != size:
        raise UserError(
            f"{name} has bytes after its last tensor", found=f"{size - at} of {size} bytes belong to none"
        )
    return {t.name: t for t in found}
