"""Weights straight from the checkpoint's files, one unit at a time: bounded memory, no model built.

Bytes are read with ``pread``, not mapped: a file that shrinks while it is read is an error, not a dead process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from bitatlas.analysis.checkpoint import CheckpointFiles
from bitatlas.analysis.model_index import is_mxfp4, matrix_shape, scale_of
from bitatlas.analysis.safetensors_header import TensorInfo, open_regular
from bitatlas.analysis.scaled import dequantize_fp8, dequantize_mxfp4
from bitatlas.analysis.schema import ModelIndex, QuantUnit
from bitatlas.kernels import cpu_packing
from bitatlas.kernels.errors import UserError

__all__ = ["ALIGN", "BLOCK", "TORCH_DTYPES", "WeightReader", "oriented"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
BLOCK = 1 << 22  # weights of a huge unit that are held at a time
ALIGN = 128  # rows or columns in a block are a multiple
_FP8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


class WeightReader:
    """Reads units and kept tensors of an indexed checkpoint. A context manager; not for several threads.

    Raises:
        UserError: the index is of a GGUF file, or the folder no longer holds what was indexed.
    """

    def __init__(self, index: ModelIndex) -> None:
        if index.source == "gguf":
            raise UserError("a GGUF file has to be imported before its weights can be read", found=index.path,
                            fix="bitatlas.analysis.gguf_import.import_gguf(FILE, FOLDER); jobs do it by themselves")  # fmt: skip
        self.index = index
        self.files = CheckpointFiles.open(index.path)
        self._units = {u.key: u for u in index.units}
        self._open: dict[str, int] = {}
        for u in index.units:
            found = self.files.tensors.get(u.tensor)
            shape = () if found is None else matrix_shape(found[1])
            if sorted(shape[-2:]) != sorted((u.rows * 2 if u.part else u.rows, u.cols)):
                have = f"shape {list(shape)}" if shape else "no such tensor"
                raise UserError("the checkpoint changed since it was indexed", found=f"{u.tensor}: {have}",
                                fix="scan it again")  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; the reader opens them again when asked."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def get(self, unit: str | QuantUnit) -> Tensor:
        """The unit's weight, (rows, cols) float32 in its own orientation, contiguous, a fresh copy.

        Raises:
            UserError: an unknown unit; NaN or Inf in it; the file changed or is truncated.
        """
        if isinstance(unit, str):
            if unit not in self._units:
                raise UserError(
                    f"there is no unit {unit!r}", found=f"{len(self._units)} units in {self.index.name}"
                )
            unit = self._units[unit]
        stacked = len(self.files.tensors[unit.tensor][1].shape) >= 3
        weight = self._resolved(unit.tensor, unit.expert if stacked else None)
        weight = oriented(weight, unit).contiguous()
        _check_finite(unit.tensor, weight)
        return weight

    def window(
        self,
        unit: QuantUnit,
        rows: tuple[int, int],
        cols: tuple[int, int] | None = None,
        stored: bool = False,
    ) -> Tensor:
        """Rows (start, stop) and columns (start, stop; None = all) of a unit, float32; nothing else is read.

        MXFP4 experts are the exception: they are small and come through `get`. ``stored`` leaves 16-bit weights as they are
        and does not look for NaN and Inf: whoever rounds them sees every weight anyway.

        Raises:
            UserError: as `get`.
        """
        info = self.files.tensors[unit.tensor][1]
        (a, b), (c, d) = rows, cols or (0, unit.cols)
        if is_mxfp4(info):
            return self.get(unit)[a:b, c:d]
        if unit.part:  # the unit's rows in the fused matrix; both halves alternate, or one follows the other
            first = 0 if unit.part == "gate" else 1
            a, b = (2 * a, 2 * b) if unit.interleaved else (a + first * unit.rows, b + first * unit.rows)
        box = (c, d, a, b) if unit.transposed else (a, b, c, d)
        weight = self._box(info, unit.expert if len(info.shape) >= 3 else None, box, stored)
        if unit.transposed:
            weight = weight.T
        if unit.interleaved and unit.part:
            weight = weight[first::2]
        weight = weight.contiguous()
        if not stored:
            _check_finite(unit.tensor, weight)
        return weight

    def blocks(
        self, unit: QuantUnit, columns: bool = False, step: int = 0, stored: bool = False
    ) -> Iterator[Tensor]:
        """The unit as consecutive blocks of ``step`` rows, or columns; by default some 16 MiB, a multiple of 128.

        float32 and checked, or as `window` says of ``stored``.
        """
        along, other = (unit.cols, unit.rows) if columns else (unit.rows, unit.cols)
        step = step or max(BLOCK // other // ALIGN, 1) * ALIGN
        for start in range(0, along, step):
            part = start, min(start + step, along)
            rows, cols = ((0, unit.rows), part) if columns else (part, None)
            yield self.window(unit, rows, cols, stored)

    def _box(
        self, info: TensorInfo, expert: int | None, box: tuple[int, int, int, int], stored: bool = False
    ) -> Tensor:
        """Rows a to b, columns c to d of a stored matrix or of one expert's slice, its scales applied; float32 or ``stored``."""
        a, b, c, d = box
        scale_name = scale_of(info.name, self.files.tensors) if info.dtype in _FP8 else ""
        if not scale_name:
            weight = self._read_box(info, expert, box)
            return weight if stored and weight.dtype in (torch.bfloat16, torch.float16) else weight.float()
        scale_info = self.files.tensors[scale_name][1]
        scale = self._read(scale_info, expert if len(scale_info.shape) >= 3 else None)
        high, wide = self._block()
        # Whole blocks of the scale grid, so that the first scale belongs to the first row and column.
        top, left = a - a % high, c - c % wide
        if scale.dim() == 1 and scale.numel() > 1:
            scale = scale.unsqueeze(-1)
        if scale.dim() == 2:
            shape = info.shape[-2:]
            for axis, (start, stop, size) in enumerate(((top, b, high), (left, d, wide))):
                step = 1 if scale.shape[axis] == shape[axis] else size
                if scale.shape[axis] > 1:
                    scale = scale.narrow(axis, start // step, -(-stop // step) - start // step)
        weight = self._read_box(info, expert, (top, b, left, d)).float()
        return dequantize_fp8(weight, scale, (high, wide), info.name)[a - top :, c - left :]

    def _read_box(self, info: TensorInfo, expert: int | None, box: tuple[int, int, int, int]) -> Tensor:
        if info.dtype not in TORCH_DTYPES:
            raise UserError(f"the tensor {info.name} has a dtype that cannot be read", found=info.dtype)
        a, b, c, d = box
        rows, cols = info.shape[-2:]
        dtype = TORCH_DTYPES[info.dtype]
        if b <= a or d <= c:
            return torch.empty(max(b - a, 0), max(d - c, 0))
        start = info.start + ((expert or 0) * rows + a) * cols * dtype.itemsize
        shard = self.files.tensors[info.name][0]
        if d - c == cols:
            raw = self._bytes(shard, start, start + (b - a) * cols * dtype.itemsize)
        else:
            step, offset, length = cols * dtype.itemsize, c * dtype.itemsize, (d - c) * dtype.itemsize
            raw = torch.empty((b - a) * length, dtype=torch.uint8)
            for row in range(b - a):
                at = start + row * step + offset
                raw[row * length : (row + 1) * length] = self._bytes(shard, at, at + length)
        return raw.view(dtype).reshape(b - a, d - c)

    def kept(self, name: str) -> Tensor:
        """Any tensor of the checkpoint as it is stored: its own shape and dtype, a fresh copy.

        Raises:
            UserError: no such tensor, a dtype that torch lacks, the file changed or is truncated.
        """
        if name not in self.files.tensors:
            raise UserError(
                f"there is no tensor {name!r}", found=f"{len(self.files.tensors)} in {self.index.name}"
            )
        return self._read(self.files.tensors[name][1], None, as_stored=True)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor for a model: fp8 and MXFP4 come dequantised as float32, all others as they are stored.

        Raises:
            UserError: as `kept`; NaN or Inf in a floating tensor.
        """
        info = self.files.tensors[name][1]
        tensor = self._resolved(name, None) if info.dtype in _FP8 or is_mxfp4(info) else self.kept(name)
        if tensor.is_floating_point():
            _check_finite(name, tensor)
        return tensor

    def _read(self, info: TensorInfo, expert: int | None, as_stored: bool = False) -> Tensor:
        """The tensor, or one slice along its first dimension; float32 unless ``as_stored``."""
        if info.dtype not in TORCH_DTYPES:
            raise UserError(f"the tensor {info.name} has a dtype that cannot be read", found=info.dtype)
        shape, start, end = info.shape, info.start, info.end
        if expert is not None:
            step = info.nbytes // shape[0]
            start, end, shape = start + expert * step, start + (expert + 1) * step, shape[1:]
        dtype = TORCH_DTYPES[info.dtype]
        if end == start:
            return torch.empty(shape, dtype=dtype)
        tensor = self._bytes(self.files.tensors[info.name][0], start, end).view(dtype).reshape(shape)
        return tensor if as_stored else tensor.to(torch.float32)

    def _bytes(self, shard: str, start: int, end: int) -> Tensor:
        header = self.files.shards[shard]
        if shard not in self._open:
            self._open[shard] = open_regular(self.files.folder / shard)
        now = os.fstat(self._open[shard])
        buffer = torch.empty(
            end - start, dtype=torch.uint8
        )  # unlike a bytearray, not filled with zeros first
        view, done = buffer.numpy().data, 0
        if (now.st_size, now.st_mtime_ns) == (header.file_size, header.mtime_ns):
            while done < len(buffer):
                count = os.preadv(self._open[shard], [view[done : done + (1 << 30)]], start + done)
                if count <= 0:
                    break
                done += count
        if done < len(buffer):
            raise UserError(f"{shard} changed while it was read", found=f"{now.st_size} bytes, {header.file_size} before",
                            fix="let the download or copy finish, then run again")  # fmt: skip
        return buffer

    def _resolved(self, name: str, expert: int | None) -> Tensor:
        """float32 of a tensor or of one expert's slice, its scales applied; MXFP4 comes as (.., rows, cols)."""
        info = self.files.tensors[name][1]
        scale_name = scale_of(name, self.files.tensors) if info.dtype in _FP8 or is_mxfp4(info) else ""
        if not scale_name:
            return self._read(info, expert)
        scale_info = self.files.tensors[scale_name][1]
        sliced = expert if len(scale_info.shape) >= 3 else None
        if is_mxfp4(info):
            return dequantize_mxfp4(
                self._read(info, expert, True), self._read(scale_info, sliced, True), name
            )
        return dequantize_fp8(self._read(info, expert), self._read(scale_info, sliced), self._block(), name)

    def _block(self) -> tuple[int, int]:
        quant = self.files.config.get("quantization_config")
        size = quant.get("weight_block_size") if isinstance(quant, dict) else None
        ok = isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)
        return (size[0], size[1]) if ok and size else (128, 128)


def _check_finite(name: str, tensor: Tensor) -> None:
    plain = tensor.dtype == torch.float32 and tensor.is_contiguous()
    if plain and cpu_packing.available(tensor) and cpu_packing.finite(tensor):
        return
    # torch has no such functions for one-byte floats.
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    # NaN and Inf reach the extremes; looking there is three times faster than at each.
    if tensor.numel() and not all(map(math.isfinite, map(float, torch.aminmax(wide)))):
        finite = torch.isfinite(wide)
        bad = int(tensor.numel() - finite.sum())
        raise UserError(f"the weight {name} holds NaN or Inf", found=f"{bad} of {tensor.numel()} values",
                        fix="the checkpoint is damaged; download it again or take another one")  # fmt: skip


def oriented(weight: Tensor, unit: QuantUnit) -> Tensor:
    """View of a stored 2-D matrix (or one expert's slice) as the unit's (rows, cols): its half, its orientation."""
    if unit.transposed:
        weight = weight.T
    if unit.part and unit.interleaved:
        weight = weight[0 if unit.part == "gate" else 1 :: 2]
    elif unit.part:
        weight = weight[: unit.rows] if unit.part == "gate" else weight[unit.rows :]
    return weight
