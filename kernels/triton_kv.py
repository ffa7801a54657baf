"""The KV cache on the GPU: K and V quantised and packed in one pass, and decode attention that reads them packed.

Same tensors as `kernels.kv.quantize`: codes bit-packed along the channels, float16 scale and minimum per token (``token``)
or per channel and block of tokens (``channel``). K and V have bits and axes of their own. Decoding is split over the
sequence: every program runs a numerically safe softmax over its tokens, partial results are joined in a second,
deterministic step together with the 16-bit window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitatlas.kernels.kv.formats import KvFormat
from bitatlas.kernels.kv.quantize import PackedKv
from bitatlas.kernels.packing import packed_words
from bitatlas.kernels.tuned import kv_chunk

__all__ = ["decode_attention", "pack_kv"]

# Packed tokens of one program, and of one step of it, where nothing was measured (`kernels.tuned`).
_CHUNK = 512, 32


@triton.jit
def quantize_kv_kernel(
    x, words, scale, low, tokens, dim, n_words, block,
    BITS: tl.constexpr, CHANNEL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One head's T tokens (for ``channel`` exactly one block of them): extremes, codes, words.

    BITS divides 32, so no code straddles two words: the codes of a word are summed, shifted, over its channels.
    """
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    t = tile * block + tl.arange(0, T)
    d = tl.arange(0, D)
    inside = ((tl.arange(0, T) < block) & (t < tokens))[:, None] & (d < dim)[None, :]
    value = tl.load(x + (head * tokens + t[:, None]) * dim + d[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    over: tl.constexpr = 0 if CHANNEL else 1
    least = tl.min(tl.where(inside, value, float("inf")), axis=over)
    most = tl.max(tl.where(inside, value, float("-inf")), axis=over)
    least = tl.minimum(tl.maximum(least, -65504.0), 65504.0).to(tl.float16)
    step = (most - least.to(tl.float32)) / ((1 << BITS) - 1)
    step = tl.minimum(tl.maximum(step, 5.960464477539063e-08), 65504.0).to(tl.float16)
    if CHANNEL:
        at = (head * (tokens // block) + tile) * dim + d
        tl.store(scale + at, step, mask=d < dim)
        tl.store(low + at, least, mask=d < dim)
        shift, size = least[None, :], step[None, :]
    else:
        seen = (tl.arange(0, T) < block) & (t < tokens)
        tl.store(scale + head * tokens + t, step, mask=seen)
        tl.store(low + head * tokens + t, least, mask=seen)
        shift, size = least[:, None], step[:, None]
    # Correctly rounded, or a code at a tie would differ from the reference's.
    ratio = tl.div_rn(value - shift.to(tl.float32), tl.broadcast_to(size.to(tl.float32), (T, D)))
    # Round half to even, as torch does: floor(x + 1/2), one less where that was a tie and came out odd.
    code = tl.floor(ratio + 0.5)
    tie = (code - ratio == 0.5) & (code - 2 * tl.floor(code / 2) == 1)
    code = tl.where(tie, code - 1, code)
    code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0)
    code = tl.where(inside, code, 0.0).to(tl.uint32)
    PER: tl.constexpr = 32 // BITS
    placed = tl.reshape(code << ((d % PER) * BITS).to(tl.uint32)[None, :], (T, D // PER, PER))
    out = tl.sum(placed, axis=2)  # disjoint bits: the sum is the union
    w = tl.arange(0, D // PER)
    seen = ((tl.arange(0, T) < block) & (t < tokens))[:, None] & (w < n_words)[None, :]
    tl.store(words + (head * tokens + t[:, None]) * n_words + w[None, :], out, mask=seen)


@triton.jit
def _read(
    words,
    scale,
    low,
    head,
    t,
    tokens,
    block,
    d,
    dim,
    n_words,
    inside,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
):
    """(T, D) float32 of a head's packed tokens ``t``."""
    PER: tl.constexpr = 32 // BITS
    word = tl.load(words + (head * tokens + t[:, None]) * n_words + (d // PER)[None, :], mask=inside, other=0)
    code = (word >> ((d % PER) * BITS).to(tl.uint32)[None, :]) & ((1 << BITS) - 1)
    if CHANNEL:
        at = (head * (tokens // block) + (t // block)[:, None]) * dim + d[None, :]
    else:
        at = tl.broadcast_to((head * tokens + t)[:, None], inside.shape)
    step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, code.to(tl.float32) * step + least, 0.0)


@triton.jit
def decode_kernel(
    q, k_words, k_scale, k_low, v_words, v_scale, v_low, out, top, total,
    first, tokens, k_dim, v_dim, k_n, v_n, block, group, chunk, splits, scaling,
    K_BITS: tl.constexpr, K_CHANNEL: tl.constexpr, V_BITS: tl.constexpr, V_CHANNEL: tl.constexpr,
    G: tl.constexpr, T: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One K/V head and one chunk of its tokens, for the ``group`` query heads that share it."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g, dk, dv = tl.arange(0, G), tl.arange(0, DK), tl.arange(0, DV)
    rows = head * group + g
    query = tl.load(
        q + rows[:, None] * k_dim + dk[None, :], mask=(g < group)[:, None] & (dk < k_dim)[None, :], other=0.0
    )
    query = query.to(tl.float32) * scaling
    peak = tl.full((G,), float("-inf"), tl.float32)
    weight = tl.zeros((G,), tl.float32)
    result = tl.zeros((G, DV), tl.float32)
    begin = first + split * chunk
    stop = tl.minimum(begin + chunk, tokens)
    for start in range(begin, stop, T):
        t = start + tl.arange(0, T)
        seen = t < stop
        key = _read(k_words, k_scale, k_low, head, t, tokens, block, dk, k_dim, k_n,
                    seen[:, None] & (dk < k_dim)[None, :], K_BITS, K_CHANNEL)  # fmt: skip
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")  # (G, T)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        fade = tl.exp(peak - higher)
        p = tl.exp(scores - higher[:, None])
        value = _read(v_words, v_scale, v_low, head, t, tokens, block, dv, v_dim, v_n,
                      seen[:, None] & (dv < v_dim)[None, :], V_BITS, V_CHANNEL)  # fmt: skip
        result = result * fade[:, None] + tl.dot(p, value, input_precision="ieee")
        weight = weight * fade + tl.sum(p, axis=1)
        peak = higher
    at = rows * splits + split
    tl.store(top + at, peak, mask=g < group)
    tl.store(total + at, weight, mask=g < group)
    tl.store(
        out + at[:, None] * v_dim + dv[None, :], result, mask=(g < group)[:, None] & (dv < v_dim)[None, :]
    )


def pack_kv(x: Tensor, fmt: KvFormat, block: int) -> PackedKv:
    """The same as `kernels.kv.quantize.pack_kv`; x (B, H, T, D), T whole blocks."""
    b, h, t, d = x.shape
    n = packed_words(d, fmt.bits)
    channel = fmt.axis == "channel"
    words = torch.empty(b, h, t, n, dtype=torch.int32, device=x.device)
    shape = (b, h, t // block, d) if channel else (b, h, t, 1)
    scale, low = (torch.empty(shape, dtype=torch.float16, device=x.device) for _ in range(2))
    if x.numel():
        tile = (triton.next_power_of_2(block), max(triton.next_power_of_2(d), 32 // fmt.bits))
        quantize_kv_kernel[(b * h, triton.cdiv(t, block))](
            x.contiguous(), words.view(torch.uint32), scale, low, t, d, n, block, fmt.bits, channel, *tile
        )
    return PackedKv(words, scale, low, fmt, block, d)


def decode_attention(
    q: Tensor,
    k: PackedKv,
    v: PackedKv,
    k_plain: Tensor,
    v_plain: Tensor,
    scaling: float,
    chunk: int | None = None,
    tile: int | None = None,
    first: int = 0,
) -> Tensor:
    """Attention of one new token over packed and plain keys.

    Args:
        q: (B, heads, D); heads is a multiple of K's.
        k, v: packed part. k_plain, v_plain: the 16-bit window, (B, H, n, D), the new token in it.
        scaling: of the scores.
        chunk: packed tokens of one program; tile: of one step of it. As measured on this GPU when both are left out.
        first: packed tokens before it are not looked at (a window that slides over blocks).

    Returns:
        (B, heads, DV) in q's type.
    """
    b, heads, d = q.shape
    h, tokens, dv = k.words.shape[1], k.tokens, v.dim
    group = heads // h
    if chunk is None and tile is None:
        chunk, tile = kv_chunk(q.device, (k.fmt.bits, v.fmt.bits), d, b * h, max(tokens - first, 1)) or _CHUNK
    chunk, tile = chunk or _CHUNK[0], tile or _CHUNK[1]
    splits = triton.cdiv(max(tokens - first, 0), chunk)
    shape = (b, heads, splits)
    out = torch.zeros(*shape, dv, dtype=torch.float32, device=q.device)
    top = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    total = torch.zeros(shape, dtype=torch.float32, device=q.device)
    if splits:
        sizes = (
            max(16, triton.next_power_of_2(group)),
            tile,
            max(16, triton.next_power_of_2(d)),
            max(16, triton.next_power_of_2(dv)),
        )
        decode_kernel[(b * h, splits)](
            q.contiguous(), k.words.view(torch.uint32), k.scale, k.low, v.words.view(torch.uint32), v.scale, v.low,
            out, top, total, first, tokens, d, dv, k.words.shape[3], v.words.shape[3], k.block, group, chunk, splits, scaling,
            k.fmt.bits, k.fmt.axis == "channel", v.fmt.bits, v.fmt.axis == "channel", *sizes,
        )  # fmt: skip
    # The window is short: torch does it, as one more split.
    grouped = q.float().view(b, h, group, d) * scaling
    scores = grouped @ k_plain.float().transpose(-1, -2)  # (B, H, group, n)
    peak = scores.amax(-1, keepdim=True)
    p = (scores - peak).exp()
    out = torch.cat([out, (p @ v_plain.float()).view(b, heads, 1, dv)], 2)
    top = torch.cat([top, peak.view(b, heads, 1)], 2)
    total = torch.cat([total, p.sum(-1).view(b, heads, 1)], 2)
    fade = (top - top.amax(-1, keepdim=True)).exp()
    return ((out * fade[..., None]).sum(2) / (total * fade).sum(-1, keepdim=True)).to(q.dtype)
