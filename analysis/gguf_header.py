"""The header of a GGUF file, read by a bounded parser of our own: torch-free, and without the gguf package.

The gguf package hangs or eats the memory on hostile files (huge counts, dimensions that wrap), so it only ever
sees files that passed here. Layout (versions 2 and 3, little-endian): magic, version, tensor count, key count,
keys, tensor infos, padding to the alignment, data.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bitatlas.analysis.safetensors_header import open_regular
from bitatlas.kernels.errors import UserError

__all__ = ["GGML_TYPES", "GgufArray", "GgufHeader", "GgufTensor", "read_gguf_header"]

MAX_TENSORS = 200_000
MAX_KEYS = 65_536
MAX_STRING = 1 << 20
MAX_ARRAY = 1 << 21
MAX_METADATA = 256 << 20
MAX_STRINGS = 4 << 20
_KEEP_ARRAY = 1024
_MAX_DIMS = 4

GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""ggml type id -> (name, weights in a block, bytes of a block)."""

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array too long to keep: only its length is known (the vocabulary, the merges)."""

    length: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: type name, shape in torch's order (outermost first), absolute place in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header: scalars, strings and short arrays of the metadata, all tensors, sha256 of the header bytes."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    file_size: int
    sha256: str


class _Cursor:
    """Reads forward, never beyond the file or the metadata limit."""

    def __init__(self, f: BinaryIO, size: int, name: str) -> None:
        self.f, self.name = f, name
        self.limit, self.at = min(size, MAX_METADATA), 0
        self.strings = 0
        self.hash = hashlib.sha256()

    def take(self, count: int) -> bytes:
        if count > self.limit - self.at:
            raise UserError(f"{self.name} is truncated or its header is not sound",
                            found=f"{count} bytes wanted at byte {self.at} of {self.limit}",
                            fix="download the file again")  # fmt: skip
        data = self.f.read(count)
        if len(data) != count:
            raise UserError(
                f"{self.name} changed while it was read", found=f"ended at byte {self.at + len(data)}"
            )
        self.at += count
        self.hash.update(data)
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        self.strings += 1
        if length > MAX_STRING or self.strings > MAX_STRINGS:
            raise UserError(f"{self.name} holds strings that cannot be read safely",
                            found=f"number {self.strings}, {length} bytes long")  # fmt: skip
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise UserError(f"{self.name} has a metadata value of an unknown type", found=str(kind))
        return self.number(_SCALARS[kind])

    def array(self) -> list[Any] | GgufArray:
        kind, length = self.number("<I"), self.number("<Q")
        if length > MAX_ARRAY or kind == _ARRAY:
            raise UserError(f"{self.name} holds an array that cannot be read safely",
                            found="an array of arrays" if kind == _ARRAY else f"{length} entries")  # fmt: skip
        if length <= _KEEP_ARRAY:
            return [self.value(kind) for _ in range(length)]
        if kind == _STRING:
            for _ in range(length):
                self.string()
        elif kind in _SCALARS:
            self.take(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise UserError(f"{self.name} has an array of an unknown type", found=str(kind))
        return GgufArray(length)


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Read and check the header; no tensor data is touched.

    Raises:
        UserError: not GGUF, another version or byte order, counts or strings beyond the limits, an unknown tensor
            type, dimensions that do not fit, offsets that are misaligned, overlap or leave the file.
    """
    path = Path(path)
    with os.fdopen(open_regular(path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        cursor = _Cursor(f, size, path.name)
        if cursor.take(4) != b"GGUF":
            raise UserError(f"{path.name} is not a GGUF file", found="another magic number",
                            fix="give a .gguf file or a checkpoint folder")  # fmt: skip
        version = cursor.number("<I")
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise UserError(f"{path.name} has a GGUF version that is not read",
                            found="a big-endian file" if big else f"version {version}; 2 and 3 are read")  # fmt: skip
        tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise UserError(f"{path.name} has too many entries to be read safely",
                            found=f"{tensor_count} tensors, {key_count} keys")  # fmt: skip
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            if key in metadata:
                raise UserError(f"{path.name} has a metadata key twice", found=repr(key[:120]))
            metadata[key] = cursor.value(cursor.number("<I"))
        tensors = _tensors(cursor, tensor_count, metadata.get("general.alignment", 32), size)
        return GgufHeader(path, version, metadata, tensors, size, cursor.hash.hexdigest())


def _tensors(cursor: _Cursor, count: int, alignment: Any, size: int) -> dict[str, GgufTensor]:
    name = cursor.name
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise UserError(f"{name} has an impossible alignment", found=str(alignment)[:40])
    found: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        key, n_dims = cursor.string(), cursor.number("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise UserError(
                f"tensor {key[:120]!r} of {name} has an impossible number of dimensions", found=str(n_dims)
            )
        dims = [cursor.number("<Q") for _ in range(n_dims)]
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        if kind not in GGML_TYPES:
            raise UserError(f"tensor {key[:120]!r} of {name} has an unknown type", found=f"ggml type {kind}",
                            fix="convert the file to a common type such as Q8_0 or F16")  # fmt: skip
        label, block, block_bytes = GGML_TYPES[kind]
        # Python's integers do not wrap, so a product of huge dimensions is seen as what it is.
        if 0 in dims or dims[0] % block or math.prod(dims) // block * block_bytes > size:
            raise UserError(
                f"tensor {key[:120]!r} of {name} has impossible dimensions", found=f"{label} {dims}"
            )
        found.append((key, label, tuple(reversed(dims)), offset, math.prod(dims) // block * block_bytes))
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    at = 0
    for key, label, shape, offset, nbytes in sorted(found, key=lambda t: t[3]):
        if offset % alignment or offset < at or base + offset + nbytes > size:
            raise UserError(
                f"tensor {key[:120]!r} of {name} is misaligned, overlaps another or leaves the file",
                found=f"offset {offset}, {nbytes} bytes, alignment {alignment}, data section of {size - base} bytes",
                fix="download the file again",
            )
        if key in tensors:
            raise UserError(f"{name} names a tensor twice", found=repr(key[:120]))
        at = offset + nbytes
        tensors[key] = GgufTensor(key, label, shape, base + offset, base + at)
    if not tensors:
        raise UserError(f"{name} holds no tensors", found=f"{size} bytes of metadata")
    return tensors
