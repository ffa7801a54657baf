"""One launch for all experts of a layer, each in a format of its own: grouped product with mixed bits.

Every expert's matrix is described by a row of a table (addresses of its codes, scales and zeros, bits, group size);
one kernel body reads the bits at run time, so 2-bit and 8-bit experts share a launch. A tile is (expert, block of its
tokens, block of its rows); tiles of wide experts come first, because they take longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitatlas.kernels import tuned
from bitatlas.kernels.packed.matrix import PackedMatrix
from bitatlas.kernels.triton_bits import product, stream_values

__all__ = ["ExpertTable", "Routing", "grouped_linear", "route"]

_FIELDS = 6  # codes, scales, zeros, bits, group, groups
_STEP = 32  # columns in one step; divides every group size
_TILE = 16, 64  # pairs and rows of W in a tile where nothing was measured (`kernels.tuned`)


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Matrices of one projection of all experts, by address.

    Attributes:
        rows, cols: their shape, the same for all.
        table: (experts, 6) int64 on the device; bits are 16 for float16 and -16 for bfloat16 weights.
        bits: (experts,) on the CPU, for the order of the tiles.
        keep: the matrices, so that the addresses stay alive.
    """

    rows: int
    cols: int
    table: Tensor
    bits: Tensor
    keep: tuple[PackedMatrix, ...]

    @classmethod
    def build(cls, matrices: Sequence[PackedMatrix]) -> ExpertTable:
        """From matrices on one device."""
        first = matrices[0]
        table = torch.zeros(len(matrices), _FIELDS, dtype=torch.int64)
        for e, m in enumerate(matrices):
            if (m.rows, m.cols) != (first.rows, first.cols):
                raise ValueError(f"expert {e} is ({m.rows}, {m.cols}), not ({first.rows}, {first.cols})")
            if m.format.kind == "float":
                sign = -1 if m.format.name == "bf16" else 1
                table[e] = torch.tensor([m.weight.data_ptr(), 0, 0, 16 * sign, m.cols, 1])
                continue
            zeros = 0 if m.zeros is None else m.zeros.data_ptr()
            group = m.format.group_size or -(-m.cols // _STEP) * _STEP
            table[e] = torch.tensor(
                [
                    m.codes.data_ptr(),
                    m.scales.data_ptr(),
                    zeros,
                    m.format.bits,
                    group,
                    m.format.groups(m.cols),
                ]
            )
        device = next(first.buffers()).device
        return cls(first.rows, first.cols, table.to(device), table[:, 3].abs(), tuple(matrices))


@dataclass(frozen=True, slots=True)
class Routing:
    """Chosen (token, slot) pairs sorted by expert.

    Attributes:
        token: (pairs,) int64, row of the input; pair: (pairs,) int64, position in the unsorted (tokens * k) list.
        tiles: (tiles, 3) int32: expert, first pair, pairs in the tile; block: pairs that a tile can hold.
    """

    token: Tensor
    pair: Tensor
    tiles: Tensor
    block: int


@triton.jit
def grouped_kernel(
    x, source, tiles, table, out, n, k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[pair, n] = x[source[pair]] @ W_expert.T for one tile of pairs and N rows of W."""
    tile = tiles + tl.program_id(0) * 3
    expert = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    entry = table + expert * 6
    bits = tl.load(entry + 3).to(tl.int32)
    group = tl.load(entry + 4).to(tl.int32)
    groups = tl.load(entry + 5).to(tl.int32)
    zeros_at = tl.load(entry + 2)
    pair = first + tl.arange(0, M)
    live = tl.arange(0, M) < count
    token = tl.load(source + pair, mask=live, other=0).to(tl.int64)
    row = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), dtype=tl.float32)
    if bits == 16 or bits == -16:
        weights = tl.load(entry).to(tl.pointer_type(tl.uint16))
        for start in range(0, k, K):
            col = start + tl.arange(0, K)
            a = tl.load(
                x + token[:, None] * k + col[None, :], mask=live[:, None] & (col[None, :] < k), other=0.0
            )
            inside = (col[:, None] < k) & (row[None, :] < n)
            raw = tl.load(weights + row[None, :].to(tl.int64) * k + col[:, None], mask=inside, other=0)
            as_half = raw.to(tl.float16, bitcast=True).to(tl.float32)
            as_brain = raw.to(tl.bfloat16, bitcast=True).to(tl.float32)
            b = tl.where(bits > 0, as_half, as_brain).to(a.dtype)
            total += product(a, b)
    else:
        codes = tl.load(entry).to(tl.pointer_type(tl.uint32))
        scales = tl.load(entry + 1).to(tl.pointer_type(tl.float16))
        zeros = zeros_at.to(tl.pointer_type(tl.uint32))
        words = (k * bits + 31) // 32
        middle = (1 << bits) >> 1
        asymmetric = (tl.zeros_like(row).to(tl.int64) + zeros_at) != 0
        for start in range(0, k, K):
            col = start + tl.arange(0, K)
            a = tl.load(
                x + token[:, None] * k + col[None, :], mask=live[:, None] & (col[None, :] < k), other=0.0
            )
            inside = (col[:, None] < k) & (row[None, :] < n)
            cols_2d = tl.broadcast_to(col[:, None], (K, N))
            code = stream_values(codes + row[None, :].to(tl.int64) * words, cols_2d, bits, inside)
            at = row * groups + start // group
            scale = tl.load(scales + at, mask=row < n, other=0.0).to(tl.float32)
            stored = stream_values(zeros, at, bits, (row < n) & asymmetric)
            zero = tl.where(asymmetric, stored, middle)
            b = (code - zero[None, :]).to(tl.float32).to(a.dtype)
            total += product(a, b) * scale[None, :]
    at_out = pair[:, None].to(tl.int64) * n + row[None, :]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=live[:, None] & (row[None, :] < n))


def _tile(device: torch.device, table: ExpertTable, pairs: int) -> tuple[int, int]:
    return tuned.experts(device, table.rows, table.cols, pairs, len(table.bits)) or _TILE


def route(top_k_index: Tensor, table: ExpertTable, block: int | None = None) -> Routing:
    """Sort the chosen pairs by expert and cut them into tiles, the experts with the most bits first.

    Args:
        top_k_index: (tokens, k); indices beyond the experts choose nobody.
        block: pairs in a tile; as measured on this GPU when left out.
    """
    block = block or _tile(top_k_index.device, table, top_k_index.numel())[0]
    experts, k = len(table.bits), top_k_index.shape[1]
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].cpu()
    order = order[: int(counts.sum())]
    starts = counts.cumsum(0) - counts
    tiles = []
    for e in torch.argsort(table.bits, descending=True, stable=True).tolist():
        first, left = int(starts[e]), int(counts[e])
        tiles += [(e, first + done, min(block, left - done)) for done in range(0, left, block)]
    cut = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).to(flat.device)
    return Routing(order // k, order, cut, block)


def grouped_linear(
    x: Tensor,
    source: Tensor,
    routing: Routing,
    table: ExpertTable,
    *,
    rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(pairs, rows): each pair's input row times its expert's matrix.

    Args:
        x: (any, cols); source: (pairs,) which row of x each sorted pair takes.
        rows: rows of W in a tile; as measured on this GPU when left out.
        out: written to where given; pairs in none of the tiles are left as they are.
    """
    if out is None:
        out = torch.empty(source.shape[0], table.rows, dtype=x.dtype, device=x.device)
    rows = rows or _tile(x.device, table, source.shape[0])[1]
    if out.numel() and routing.tiles.numel():
        grid = (routing.tiles.shape[0], triton.cdiv(table.rows, rows))
        grouped_kernel[grid](
            x.contiguous(),
            source,
            routing.tiles,
            table.table,
            out,
            table.rows,
            table.cols,
            routing.block,
            rows,
            _STEP,
        )
    return out
