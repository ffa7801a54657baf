"""One packed matrix: the buffers of a (rows, cols) weight, and how to get rows of it back.

Half-precision buffers are held as int16 bit patterns, so that `model.to(dtype)` moves but never rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from bitatlas.kernels.codebooks import entries, scale_values
from bitatlas.kernels.formats import Format
from bitatlas.kernels.packing import (
    gather_stream,
    pack_codes,
    pack_stream,
    packed_words,
    unpack_codes,
    unpack_stream,
)
from bitatlas.kernels.reference import Quantized, dequantize, quantize_dequantize

__all__ = [
    "PackedMatrix",
    "block_rows",
    "pack_blocks",
    "pack_quantized",
    "pack_weight",
    "packed_tensors",
    "quantised_matrix",
    "quantised_weight",
]

_FLOAT = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK_WEIGHTS = 1 << 19  # weights that are dequantised at a time: 2 MiB of float32, a level-2 cache
_BLOCK_ALIGN = 32  # rows; makes every block of the zero-point stream start at a whole word


def packed_tensors(fmt: Format, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the tensors that a (rows, cols) matrix is stored as."""
    if fmt.kind == "float":
        return {"weight": (_FLOAT[fmt.name], (rows, cols))}
    groups = fmt.groups(cols)
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.int32, (rows, packed_words(cols, fmt.bits))),
        "scales": (torch.uint8 if fmt.scale == "e8m0" else torch.float16, (fmt.scale_rows(rows), groups)),
    }
    if not fmt.symmetric:
        out["zeros"] = (torch.int32, (packed_words(rows * groups, fmt.bits),))
    if fmt.kind == "sparse":
        count = fmt.outlier_count(cols)
        out["outlier_columns"] = (_column_type(cols), (rows, count))
        out["outlier_values"] = (torch.float16, (rows, count))
    return out


def _column_type(cols: int) -> torch.dtype:
    """Of the outliers' columns; the 16 bits are unsigned."""
    return torch.int16 if cols <= 1 << 16 else torch.int32


def _outliers(q: Quantized) -> dict[str, Tensor]:
    if q.columns is None or q.values is None:
        return {}
    cols = q.codes.shape[1]
    # 40 000 is stored as the bit pattern of 40 000 - 65 536.
    columns = (
        torch.where(q.columns >= 1 << 15, q.columns - (1 << 16), q.columns) if cols <= 1 << 16 else q.columns
    )
    return {"outlier_columns": columns.to(_column_type(cols)), "outlier_values": q.values}


def pack_quantized(q: Quantized) -> dict[str, Tensor]:
    """The stored tensors of a quantised matrix; names, dtypes and shapes as `packed_tensors` says."""
    out = {"codes": pack_codes(q.codes, q.format.bits), "scales": q.scales.contiguous()}
    if q.zeros is not None:
        out["zeros"] = pack_stream(q.zeros, q.format.bits)
    return out | _outliers(q)


def pack_weight(
    weight: Tensor, fmt: Format, quantize: Callable[[Tensor, Format], Quantized]
) -> dict[str, Tensor]:
    """The stored tensors of a (rows, cols) weight, quantised a block of rows at a time to bound the memory.

    Raises:
        UserError: the weight holds NaN or Inf.
    """
    return pack_blocks([weight], weight.shape[0], weight.shape[1], fmt, quantize)


def pack_blocks(
    weight: Iterable[Tensor],
    rows: int,
    cols: int,
    fmt: Format,
    quantize: Callable[[Tensor, Format], Quantized],
) -> dict[str, Tensor]:
    """`pack_weight` of a weight that comes as consecutive (n, cols) blocks of rows, so that it need not be held whole.

    With one scale for the matrix ``quantize`` has to know the largest weight, or the matrix has to be one block.

    Raises:
        UserError: the weight holds NaN or Inf.
    """
    out = {
        n: torch.empty(shape, dtype=dtype) for n, (dtype, shape) in packed_tensors(fmt, rows, cols).items()
    }
    zeros, at = [], 0
    for block in weight:
        if fmt.kind == "float":
            out["weight"][at : at + len(block)] = block
            at += len(block)
            continue
        for q in _quantised_blocks(block, fmt, quantize):
            here = slice(at, at + len(q.codes))
            pack_codes(q.codes, fmt.bits, out["codes"][here])
            out["scales"][slice(1) if fmt.per_tensor else here] = q.scales
            for name, part in _outliers(q).items():
                out[name][here] = part
            at = here.stop
            if q.zeros is not None:
                zeros.append(q.zeros)
    if at != rows:
        raise ValueError(f"{at} rows came, {rows} were announced")
    if zeros:
        # One stream for the matrix: blocks end inside words, so it is packed at the end.
        out["zeros"] = pack_stream(torch.cat(zeros), fmt.bits)
    return out


def quantised_weight(weight: Tensor, fmt: Format, quantize: Callable[[Tensor, Format], Quantized]) -> Tensor:
    """(rows, cols) float32: what `pack_weight` stores, dequantised; the same blocks of rows, hence the same codes.

    Raises:
        UserError: the weight holds NaN or Inf.
    """
    if fmt.kind == "float":
        return quantize_dequantize(weight, fmt)
    return torch.cat([dequantize(q) for q in _quantised_blocks(weight, fmt, quantize)])


def quantised_matrix(
    weight: Tensor, fmt: Format, quantize: Callable[[Tensor, Format], Quantized]
) -> Quantized:
    """Codes, scales and zeros of a (rows, cols) weight as `pack_weight` stores them; the same blocks of rows.

    Raises:
        UserError: the weight holds NaN or Inf.
        ValueError: a format with outliers, which only our own container holds.
    """
    if fmt.kind == "sparse":
        raise ValueError(f"{fmt.name} has outliers")
    parts = list(_quantised_blocks(weight, fmt, quantize))
    zeros = [q.zeros for q in parts if q.zeros is not None]
    scales = parts[0].scales if fmt.per_tensor else torch.cat([q.scales for q in parts])
    return Quantized(torch.cat([q.codes for q in parts]), scales, torch.cat(zeros) if zeros else None, fmt)


def _quantised_blocks(
    weight: Tensor, fmt: Format, quantize: Callable[[Tensor, Format], Quantized]
) -> Iterator[Quantized]:
    if fmt.per_tensor and getattr(quantize, "largest", None) is None:
        yield quantize(weight, fmt)  # its scale hangs on every row
        return
    for block in weight.split(block_rows(weight.shape[1])):
        yield quantize(block, fmt)


def block_rows(cols: int) -> int:
    """Rows of ``cols`` weights that are quantised at a time; blocks that come so are not divided again."""
    return max(_BLOCK_WEIGHTS // max(cols, 1), 1)


class PackedMatrix(nn.Module):
    """A (rows, cols) weight that stays packed in memory.

    Args:
        fmt: its format.
        rows, cols: output and input dimension.
        tensors: as `packed_tensors` describes; None leaves empty buffers on the current device.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    outlier_columns: Tensor
    outlier_values: Tensor
    weight: Tensor

    def __init__(
        self, fmt: Format, rows: int, cols: int, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.format, self.rows, self.cols = fmt, rows, cols
        if "zeros" not in packed_tensors(fmt, rows, cols):
            self.zeros = None
        for name, (dtype, shape) in packed_tensors(fmt, rows, cols).items():
            t = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
            if t.dtype != dtype or tuple(t.shape) != shape:
                raise ValueError(f"{name} must be {dtype} {shape}, not {t.dtype} {tuple(t.shape)}")
            self.register_buffer(name, t.view(torch.int16) if t.itemsize == 2 else t)

    def extra_repr(self) -> str:
        """Shape and format, for ``print(model)``."""
        return f"{self.rows}, {self.cols}, {self.format.name}"

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(b.numel() * b.itemsize for b in self.buffers())

    def dequantize(
        self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Rows ``start`` to ``stop`` as (rows, cols); ``start`` must be a multiple of 32."""
        stop = self.rows if stop is None else min(stop, self.rows)
        if start % _BLOCK_ALIGN:
            raise ValueError(f"the first row must be a multiple of {_BLOCK_ALIGN}, not {start}")
        if self.format.kind == "float":
            return self.weight[start:stop].view(_FLOAT[self.format.name]).to(dtype)
        bits, groups, n = self.format.bits, self.format.groups(self.cols), stop - start
        zeros = None
        if self.zeros is not None:
            first = start * groups * bits // 32
            words = self.zeros[first : first + packed_words(n * groups, bits)]
            zeros = unpack_stream(words, bits, n * groups).view(n, groups)
        return self._expand(self.codes[start:stop], slice(start, stop), zeros, dtype)

    def take_rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``ids`` (n,) as (n, cols); only these are unpacked."""
        if self.format.kind == "float":
            return self.weight[ids].view(_FLOAT[self.format.name]).to(dtype)
        zeros = None
        if self.zeros is not None:
            groups = self.format.groups(self.cols)
            index = ids.unsqueeze(1) * groups + torch.arange(groups, device=ids.device)
            zeros = gather_stream(self.zeros, self.format.bits, index)
        return self._expand(self.codes[ids], ids, zeros, dtype)

    def blocks(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """The whole matrix as consecutive (n, cols) row blocks, each small enough to stay in cache."""
        step = max(_BLOCK_WEIGHTS // max(self.cols, 1) // _BLOCK_ALIGN, 1) * _BLOCK_ALIGN
        for start in range(0, self.rows, step):
            yield self.dequantize(start, start + step, dtype)

    def _expand(
        self, codes: Tensor, rows: slice | Tensor, zeros: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        # The same arithmetic as reference.dequantize, in place and with one multiply per weight.
        n, group = codes.shape[0], self.format.group_size or self.cols
        unpacked = unpack_codes(codes, self.format.bits, self.cols)
        scales = self.scales if self.format.per_tensor else self.scales[rows]
        s = scale_values(scales if scales.dtype == torch.uint8 else scales.view(torch.float16))  # (n, groups)
        if self.format.kind == "codebook":
            w = entries(self.format.codebook).to(s.device)[unpacked.long()]
            return w.mul_(s.repeat_interleave(group, 1)[:, : self.cols]).to(dtype)
        w = unpacked.to(torch.float32)  # (n, cols)
        middle = float(1 << (self.format.bits - 1))
        z = s.new_full((), middle) if zeros is None else zeros.to(torch.float32)
        whole = self.cols // group  # groups of full width
        body = w[:, : whole * group].unflatten(1, (whole, group)) if whole else None
        if body is not None:
            body.sub_(z if zeros is None else z[:, :whole, None]).mul_(s[:, :whole, None])
        if self.cols % group:
            w[:, whole * group :].sub_(z if zeros is None else z[:, whole:]).mul_(s[:, whole:])
        w = w.view(n, self.cols)
        if self.format.kind == "sparse":
            columns = self.outlier_columns[rows].to(torch.int64)
            columns = columns & 0xFFFF if self.cols <= 1 << 16 else columns
            w.scatter_(1, columns, self.outlier_values[rows].view(torch.float16).to(torch.float32))
        return w.to(dtype)
