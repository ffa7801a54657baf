"""Checks of the Triton kernels, the same in the interpreter (CPU tensors) and on a GPU.

    python triton_cases.py DEVICE

prints a JSON object: case -> largest error, or the words of an exception. Set TRITON_INTERPRET=1 for the CPU.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.kv import KV_FORMATS, parse_kv_format, parse_pair
from bitatlas.kernels.kv.quantize import pack_kv as reference_kv
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
from bitatlas.kernels.packing import pack_codes, unpack_codes
from bitatlas.kernels.reference import quantize, quantize_dequantize

WIDTHS = (2, 3, 4, 5, 6, 8)
FORMATS = (
    "int2-g32",
    "int3-g64",
    "int4-g32-sym",
    "int5-channel",
    "int6-g128",
    "int8-g32",
    "int8-channel-sym",
)
SHAPES = ((1, 70, 97), (17, 5, 128))  # rows of x, rows of W, columns
LARGE = ((1, 1030, 2048), (40, 520, 1184), (300, 260, 2048))  # on a GPU, with the launches that are used
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Inputs are rounded to the dtype before both sides see them; what is left is summation order and the output's rounding.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}


def matrix(weight: Tensor, name: str, device: str) -> PackedMatrix:
    fmt = parse_format(name)
    return PackedMatrix(fmt, *weight.shape, pack_weight(weight, fmt, quantize)).to(device)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.float().cpu() - want.float()).abs().max() / want.float().abs().max()).item()


def pack(bits: int, device: str) -> float:
    from bitatlas.kernels import triton_pack

    for rows, cols in ((1, 1), (3, 33), (18, 101), (2, 64)):
        codes = torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8)
        packed = triton_pack.pack_codes(codes.to(device), bits, (4, 32))
        if not torch.equal(packed.cpu(), pack_codes(codes, bits)):
            return 1.0
        if not torch.equal(
            triton_pack.unpack_codes(packed, bits, cols, (4, 32)).cpu(),
            unpack_codes(packed.cpu(), bits, cols),
        ):
            return 1.0
    return 0.0


def dequantize(name: str, device: str) -> float:
    from bitatlas.kernels import triton_linear

    weight = noise(37, 147)
    got = triton_linear.dequantize(matrix(weight, name, device), tile=(32, 64))
    return (got.cpu() - quantize_dequantize(weight, parse_format(name))).abs().max().item()


def linear_large(name: str, dtype: str, device: str) -> float:
    """As `linear`, through the door that models use: own choice of tiles, splits and of dequantising."""
    from bitatlas.kernels import triton_linear

    worst = 0.0
    for m, n, k in LARGE:
        weight, x = noise(n, k, seed=1), noise(m, k, seed=2).to(DTYPES[dtype])
        got = triton_linear.linear(x.to(device), matrix(weight, name, device))
        want = x.double() @ quantize_dequantize(weight, parse_format(name)).double().T
        worst = max(worst, relative(got, want))
    return worst


def linear(name: str, dtype: str, device: str, splits: int | None = None) -> float:
    from bitatlas.kernels import triton_linear

    worst = 0.0
    for m, n, k in SHAPES:
        weight, x = noise(n, k, seed=1), noise(m, k, seed=2).to(DTYPES[dtype])
        step = 32 if "g32" in name else 64
        got = triton_linear.linear_fused(
            x.to(device), matrix(weight, name, device), tile=(16, 64, step), splits=splits
        )
        assert got.dtype == x.dtype
        want = x.double() @ quantize_dequantize(weight, parse_format(name)).double().T
        worst = max(worst, relative(got, want))
    return worst


def experts(dtype: str, device: str, n: int = 40, k: int = 97) -> float:
    from bitatlas.kernels import triton_experts

    names = ("int2-g32", "bf16", "int4-g64-sym", "int3-channel", "int8-g32", "fp16", "int6-channel-sym", "int5-g64",
             "int5-g32-sym")  # fmt: skip
    count, chosen = len(names), 2
    tokens = 18 + count
    weights = [noise(n, k, seed=e) for e in range(count)]
    table = triton_experts.ExpertTable.build(
        [matrix(w, f, device) for w, f in zip(weights, names, strict=True)]
    )
    x = noise(tokens, k, seed=99).to(DTYPES[dtype])
    index = torch.full((tokens, chosen), count)  # nobody
    index[1:18] = torch.tensor([2, 4])  # more than one tile
    index[18:, 0] = torch.arange(count)  # everybody
    index[18:, 1] = torch.arange(count).roll(3)
    routing = triton_experts.route(index.to(device), table)
    got = triton_experts.grouped_linear(x.to(device), routing.token, routing, table)
    dense = [quantize_dequantize(w, parse_format(f)).double() for w, f in zip(weights, names, strict=True)]
    flat = index.reshape(-1)
    want = torch.stack([x[p // chosen].double() @ dense[int(flat[p])].T for p in routing.pair.tolist()])
    assert sorted(routing.pair.tolist()) == (flat < count).nonzero().flatten().tolist()
    own = flat[routing.pair.cpu()]  # an expert with small weights must not hide behind one with large ones
    return max(relative(got[(own == e).to(got.device)], want[own == e]) for e in range(count))


def experts_module(family: str, device: str) -> float:
    """A whole packed experts module, its one-launch path against its loop over the experts."""
    from bitatlas.kernels.packed import modules
    from bitatlas.kernels.packed.modules import ExpertStack, PackedExperts

    class Shell(torch.nn.Module):
        has_gate = True

        def _apply_gate(self, h: Tensor) -> Tensor:
            gate, up = (h[..., ::2], h[..., 1::2]) if family == "interleaved" else h.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up

    names, hidden, wide = ("int2-g32", "int8-g32", "int3-g32"), 40, 24
    up = {
        e: {p: matrix(noise(wide, hidden, seed=e), f, device) for p in ("gate", "up")}
        for e, f in enumerate(names)
    }
    down = {
        e: {"": matrix(noise(hidden, wide, seed=9 + e), f, device)} for e, f in enumerate(reversed(names))
    }
    bias = noise(3, 2 * wide).to(device)
    layer = PackedExperts(
        Shell(), ExpertStack(up, bias, family == "interleaved"), ExpertStack(down, None, False)
    )
    x, index = (
        noise(6, hidden).to(device),
        torch.tensor([[0, 1], [1, 0], [1, 2], [2, 0], [3, 1], [0, 2]]).to(device),
    )
    weight = torch.rand(6, 2).to(device)
    got = layer._grouped(x, index, weight)
    modules_on_gpu, modules._on_gpu = modules._on_gpu, lambda x: False
    try:
        return relative(got, layer(x, index, weight).cpu())
    finally:
        modules._on_gpu = modules_on_gpu


def kv_pack(name: str, device: str) -> float:
    """1 unless words, scales and minima are those of the reference, bit for bit."""
    from bitatlas.kernels import triton_kv

    fmt = parse_kv_format(name)
    for dim, block in ((6, 4), (20, 8)):
        x = noise(2, 3, 16, dim, seed=dim) * 3 + 1
        got, want = triton_kv.pack_kv(x.to(device), fmt, block), reference_kv(x, fmt, block)
        for a, b in ((got.words, want.words), (got.scale, want.scale), (got.low, want.low)):
            if not torch.equal(a.cpu(), b):
                return 1.0
    return 0.0


def kv_decode(
    pair: str, dtype: str, device: str, tokens: int = 40, dims: tuple[int, int] = (20, 12), **launch: int
) -> float:
    """Decode attention over packed tokens and a window, grouped heads, against dense attention in double."""
    from bitatlas.kernels import triton_kv

    formats, block = parse_pair(pair), 8
    x, y = noise(2, 3, tokens, dims[0], seed=1), noise(2, 3, tokens, dims[1], seed=2)
    packed = [reference_kv(z, f, block) for z, f in zip((x, y), formats, strict=True)]
    window = [noise(2, 3, 5, n, seed=n).to(DTYPES[dtype]) for n in dims]
    q = noise(2, 6, dims[0], seed=3).to(DTYPES[dtype])
    moved = [p.map(lambda t: t.to(device)) for p in packed]
    got = triton_kv.decode_attention(
        q.to(device), *moved, *(w.to(device) for w in window), dims[0] ** -0.5, **launch
    )
    k, v = (
        torch.cat([p.dequantize().double(), w.double()], 2).repeat_interleave(2, 1)
        for p, w in zip(packed, window, strict=True)
    )
    want = torch.softmax((q.double()[:, :, None] @ k.transpose(-1, -2)) * dims[0] ** -0.5, -1) @ v
    assert got.dtype == q.dtype
    return relative(got, want[:, :, 0])


def kv_model(family: str, device: str) -> float:
    """A model that decodes through the kernel, token by token, against the same model reading dequantised K and V."""
    import transformers

    from bitatlas.kernels import triton_kv
    from bitatlas.kernels.kv import KvLayout
    from bitatlas.kernels.kv.attention import attend_packed
    from bitatlas.kernels.kv.cache import PackedKvCache

    kind, settings, pairs = KV_MODELS[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2}
    config = getattr(transformers, kind)(**sizes, **settings)
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().to(device)
    )
    plan = {i: parse_pair(p) for i, p in enumerate(pairs)}
    ids = torch.randint(1, 50, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
    calls, decode = [], triton_kv.decode_attention

    def counted(*a, **k):
        calls.append(k["first"])
        return decode(*a, **k)

    def run(pad: int, packed: bool) -> Tensor:
        cache = PackedKvCache(config, plan, KvLayout(block=4, residual=3))
        seen = torch.ones_like(ids)
        seen[1, :pad] = 0
        out = []
        with torch.no_grad(), attend_packed(model, cache if packed else None):
            for a, b in ((0, 7), *((t, t + 1) for t in range(7, 17))):
                step = model(ids[:, a:b], attention_mask=seen[:, :b], past_key_values=cache, use_cache=True)
                out.append(step.logits[:, -1:])
        assert model.config._attn_implementation == "sdpa"
        return torch.cat(out, 1).cpu()

    triton_kv.decode_attention = counted
    try:
        got, want = run(0, True), run(0, False)
        # Every step reads packed tokens in every layer but the one at 16 bits.
        expected = 10 * sum(p.k.bits < 16 and p.v.bits < 16 for p in plan.values())
        assert len(calls) == expected, f"{len(calls)} of {expected} calls"
        assert any(calls) == ("sliding_window" in settings)
        padded = relative(run(2, True), run(2, False))
        # Padding is behind the window of a sliding layer at last; elsewhere it needs a mask, which the kernel has not.
        assert (len(calls) == expected) == ("sliding_window" not in settings)
    finally:
        triton_kv.decode_attention = decode
    return max(relative(got, want), padded)


# Every pair of axes with every dtype; all nine pairs of widths on the way.
_AXES = (("token", "token"), ("token", "channel"), ("channel", "token"), ("channel", "channel"))
_BITS = tuple(itertools.product((2, 4, 8), repeat=2))
KV_DECODES = tuple(
    (f"kv{k}-{k_axis}/kv{v}-{v_axis}", dtype)
    for ((k_axis, v_axis), dtype), (k, v) in zip(
        itertools.product(_AXES, DTYPES), itertools.cycle(_BITS), strict=False
    )
)  # fmt: skip

KV_MODELS = {
    "grouped": (
        "LlamaConfig",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
        ("kv4-channel/kv2-token", "kv8-token/kv8-token"),
    ),
    "sliding": (
        "MistralConfig",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 10},
        ("kv4-token/kv8-token", "kv16/kv4-token"),
    ),
}


def cases(device: str) -> dict[str, Callable[[], float]]:
    out: dict[str, Callable[[], float]] = {}
    for bits in WIDTHS:
        out[f"pack-{bits}"] = lambda bits=bits: pack(bits, device)
    for name in FORMATS:
        out[f"dequantize-{name}"] = lambda name=name: dequantize(name, device)
        for dtype in DTYPES:
            out[f"linear-{name}-{dtype}"] = lambda name=name, dtype=dtype: linear(name, dtype, device)
    out["split-3-fp32"] = lambda: linear("int4-g32-sym", "fp32", device, splits=3)
    for family in ("plain", "interleaved"):
        out[f"module-{family}-fp32"] = lambda family=family: experts_module(family, device)
    for name in (n for n, f in KV_FORMATS.items() if f.bits < 16):
        out[f"kv-pack-{name}"] = lambda name=name: kv_pack(name, device)
    for pair, dtype in KV_DECODES:
        out[f"kv-decode-{pair}-{dtype}"] = lambda pair=pair, dtype=dtype: kv_decode(
            pair, dtype, device, chunk=24, tile=16
        )
    for family in KV_MODELS:
        out[f"kv-model-{family}-fp32"] = lambda family=family: kv_model(family, device)
    for dtype in DTYPES:
        out[f"experts-{dtype}"] = lambda dtype=dtype: experts(dtype, device)
    return out | (large(device) if device == "cuda" else {})


def large(device: str) -> dict[str, Callable[[], float]]:
    """The same on shapes that take many programs, launched as models launch them; too slow for the interpreter."""
    out: dict[str, Callable[[], float]] = {}
    for name, dtype in itertools.product(FORMATS, DTYPES):
        out[f"large-linear-{name}-{dtype}"] = lambda name=name, dtype=dtype: linear_large(name, dtype, device)
    for dtype in DTYPES:
        out[f"large-experts-{dtype}"] = lambda dtype=dtype: experts(dtype, device, n=768, k=1056)
    for pair, dtype in KV_DECODES:
        out[f"large-kv-decode-{pair}-{dtype}"] = lambda pair=pair, dtype=dtype: kv_decode(
            pair, dtype, device, tokens=3000, dims=(128, 64)
        )
    return out


def limit(case: str) -> float:
    """Largest error that a case may have."""
    return next((t for name, t in TOLERANCE.items() if case.endswith(name)), 0.0)


def main(device: str) -> None:
    torch.manual_seed(0)
    results: dict[str, float | str] = {}
    for name, case in cases(device).items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc(limit=-3)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
