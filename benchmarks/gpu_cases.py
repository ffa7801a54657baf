"""The contestants of each row of the kernels' table: ours, and the peers that are installed.

Weights and cached tokens are random bit patterns made on the device: a kernel's time does not hang on them. A contestant
that is not installed, cannot do a case or does not fit is left out, and said so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from gpu_timing import Contestant, Machine
from torch import Tensor
from torch.nn import functional as F

from bitatlas.kernels.formats import FORMATS, Format
from bitatlas.kernels.kv import KvPair, parse_pair
from bitatlas.kernels.kv.quantize import PackedKv
from bitatlas.kernels.packed.matrix import PackedMatrix, packed_tensors
from bitatlas.kernels.packing import packed_words

__all__ = ["BITS", "PAIRS", "cached", "experts", "kv_decode", "linear", "packing", "weight"]

BITS = (2, 3, 4, 5, 6, 8)
MIXED = (2, 3, 4, 8)
PAIRS = ("kv8-token", "kv4-token", "kv8-channel/kv4-token", "kv4-channel/kv2-token", "kv2-channel/kv2-token")
_WINDOW = 32  # tokens at 16 bits beside the packed ones

Make = Callable[[], Contestant]


def _random_words(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device=device)


def weight(fmt: Format, n: int, k: int, device: str) -> PackedMatrix:
    """A random packed (n, k) matrix on the device."""
    tensors = {}
    for name, (dtype, shape) in packed_tensors(fmt, n, k).items():
        words = dtype == torch.int32
        tensors[name] = _random_words(shape, device) if words else torch.rand(shape, device=device).to(dtype)
    return PackedMatrix(fmt, n, k, tensors)


def contestants(makes: dict[str, Make], what: str) -> dict[str, Contestant]:
    """Those that can be made and run once."""
    out = {}
    for name, make in makes.items():
        try:
            one = make()
            one.run(0)
        except Exception as error:  # noqa: BLE001 - whatever a peer may raise: said and left out
            print(
                f"{what}, {name}: left out ({type(error).__name__}: {str(error)[:100]})",
                file=sys.stderr,
            )
            continue
        out[name] = one
    return out


# Rows 1a to 1c


def linear(machine: Machine, n: int, k: int, m: int) -> dict[str, Contestant]:
    """One (m, k) input times a packed (n, k) weight, by every width and peer."""
    from bitatlas.kernels.triton_linear import linear as ours

    x = torch.randn(m, k, device=machine.device).bfloat16()
    crowd = 2 * len(BITS) + 2

    def packed(bits: int) -> Make:
        def make() -> Contestant:
            fmt = FORMATS[f"int{bits}-g64"]
            nbytes = fmt.payload_bytes(n, k)
            matrices = [weight(fmt, n, k, machine.device) for _ in range(machine.copies(nbytes, crowd))]
            return Contestant(lambda i: ours(x, matrices[i]), len(matrices), nbytes)

        return make

    def cublas() -> Contestant:
        nbytes = 2 * n * k
        copies = machine.copies(nbytes, crowd)
        weights = [torch.randn(n, k, device=machine.device, dtype=x.dtype) for _ in range(copies)]
        return Contestant(lambda i: x @ weights[i].T, copies, nbytes)

    def torchao() -> Contestant:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        nbytes = FORMATS["int4-g64"].payload_bytes(n, k)
        layers = []
        for _ in range(machine.copies(nbytes, crowd)):
            layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=machine.device)
            quantize_(layer, Int4WeightOnlyConfig(group_size=64))
            layers.append(layer)
        return Contestant(lambda i: layers[i](x), len(layers), nbytes)

    def gemlite(bits: int) -> Make:
        def make() -> Contestant:
            from gemlite.core import DType, GemLiteLinear

            nbytes = FORMATS[f"int{bits}-g64"].payload_bytes(n, k)
            layers = []
            for _ in range(machine.copies(nbytes, crowd)):
                layer = GemLiteLinear(W_nbits=bits, group_size=64, in_features=k, out_features=n,
                                      input_dtype=DType.BF16, output_dtype=DType.BF16)  # fmt: skip
                codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=machine.device)
                scales = torch.rand(n, k // 64, device=machine.device).bfloat16()
                layer.pack(codes, scales, torch.full_like(scales, 1 << (bits - 1)), None)
                layers.append(layer)
            return Contestant(lambda i: layers[i](x), len(layers), nbytes)

        return make

    makes: dict[str, Make] = {f"bitatlas W{bits}": packed(bits) for bits in BITS}
    makes |= {"cublas W16": cublas, "torchao W4": torchao} | {f"gemlite W{b}": gemlite(b) for b in BITS}
    return contestants(makes, f"linear {n}x{k} m {m}")


# Rows 2a and 2b


def _layers(
    machine: Machine, kinds: tuple[int, ...], chosen: list[Tensor], n: int, k: int, count: int
) -> Iterator[list[PackedMatrix]]:
    """For each routing the matrices of a layer; experts that nobody chose share one, they are not read."""
    formats = [FORMATS[f"int{kinds[e % len(kinds)]}-g64"] for e in range(count)]
    idle = {f.name: weight(f, n, k, machine.device) for f in formats}
    for index in chosen:
        own = set(index.flatten().tolist())
        yield [weight(f, n, k, machine.device) if e in own else idle[f.name] for e, f in enumerate(formats)]


def experts(
    machine: Machine, n: int, k: int, m: int, count: int, top_k: int
) -> tuple[dict[str, Contestant], dict[int, float]]:
    """Experts of 2, 3, 4 and 8 bits in one launch, uniform ones, a launch per width, and dense ones.

    Returns:
        the contestants, and for each width its share of the bytes' worth of work: chosen experts of that width over all.
    """
    from bitatlas.kernels.triton_experts import ExpertTable, Routing, grouped_linear, route

    x = torch.randn(m, k, device=machine.device).bfloat16()

    def draw() -> Tensor:
        return torch.rand(m, count, device=machine.device).topk(top_k).indices

    # The same routings for all; how many follows from the contestant with the fewest bytes, not to favour it.
    active = min(count, m * top_k)
    crowd = 3 + len(MIXED) + 1
    fewest = active * FORMATS["int2-g64"].payload_bytes(n, k)
    most = active * 2 * n * k
    copies = min(machine.copies(fewest, crowd), max(machine.memory // crowd // most, 2))
    chosen = [draw() for _ in range(copies)]
    hit = [sorted(set(index.flatten().tolist())) for index in chosen]
    share = {
        b: sum(MIXED[e % len(MIXED)] == b for experts in hit for e in experts) / sum(map(len, hit))
        for b in MIXED
    }

    def tables(kinds: tuple[int, ...]) -> tuple[list[ExpertTable], list[Routing], int]:
        built = [ExpertTable.build(layer) for layer in _layers(machine, kinds, chosen, n, k, count)]
        sizes = [FORMATS[f"int{kinds[e % len(kinds)]}-g64"].payload_bytes(n, k) for e in range(count)]
        nbytes = sum(sizes[e] for experts in hit for e in experts) // copies
        if copies * nbytes <= 4 * machine.cache:
            raise MemoryError(f"{copies} copies of {nbytes} bytes stay in the cache")
        return built, [route(i, t) for i, t in zip(chosen, built, strict=True)], nbytes

    def grouped(kinds: tuple[int, ...]) -> Make:
        def make() -> Contestant:
            built, routes, nbytes = tables(kinds)
            return Contestant(
                lambda i: grouped_linear(x, routes[i].token, routes[i], built[i]), copies, nbytes
            )

        return make

    def per_width(forked: bool) -> Make:
        def make() -> Contestant:
            built, routes, nbytes = tables(MIXED)
            parts = [
                [cut for b in MIXED if len(cut := r.tiles[t.bits.to(r.tiles.device)[r.tiles[:, 0].long()] == b])]
                for r, t in zip(routes, built, strict=True)
            ]  # fmt: skip
            outs = [x.new_empty(r.token.shape[0], n) for r in routes]
            streams = [torch.cuda.Stream() for _ in MIXED] if forked else []

            def launch(i: int, cut: Tensor) -> None:
                grouped_linear(x, routes[i].token, replace(routes[i], tiles=cut), built[i], out=outs[i])

            def run(i: int) -> None:
                if not forked:
                    for cut in parts[i]:
                        launch(i, cut)
                    return
                here = torch.cuda.current_stream()
                for stream, cut in zip(streams, parts[i], strict=False):
                    stream.wait_stream(here)
                    with torch.cuda.stream(stream):
                        launch(i, cut)
                for stream, _ in zip(streams, parts[i], strict=False):
                    here.wait_stream(stream)

            return Contestant(run, copies, nbytes)

        return make

    def dense() -> Contestant:
        # torch's grouped product of bf16 experts; pairs sorted by expert, experts that were chosen only.
        weights, ends, sources = [], [], []
        for index, own in zip(chosen, hit, strict=True):
            flat = index.flatten()
            order = flat.argsort(stable=True)
            counts = torch.bincount(flat, minlength=count)[torch.tensor(own, device=flat.device)]
            weights.append(torch.randn(len(own), n, k, device=machine.device).bfloat16())
            ends.append(counts.cumsum(0).int())
            sources.append(order // top_k)
        return Contestant(
            lambda i: torch._grouped_mm(x[sources[i]], weights[i].transpose(-1, -2), offs=ends[i]),
            copies,
            sum(map(len, hit)) * 2 * n * k // copies,
        )

    makes: dict[str, Make] = {"mixed": grouped(MIXED), "launch per width": per_width(False)}
    if machine.device == "cuda":
        makes["launch per width, forked"] = per_width(True)
    makes |= {f"uniform W{b}": grouped((b,)) for b in MIXED} | {"dense W16": dense}
    return contestants(makes, f"experts {count} {n}x{k} m {m}"), share


# Row 3


def cached(
    machine: Machine, pair: KvPair, batch: int, heads: int, tokens: int, dim: int, block: int = 32
) -> tuple[PackedKv, PackedKv]:
    """Random packed K and V, (batch, heads, tokens, dim)."""
    out = []
    for fmt in pair:
        shape = (batch, heads, tokens // block, dim) if fmt.axis == "channel" else (batch, heads, tokens, 1)
        scale, low = (torch.rand(shape, device=machine.device).half() for _ in range(2))
        words = _random_words((batch, heads, tokens, packed_words(dim, fmt.bits)), machine.device)
        out.append(PackedKv(words, scale / 256, low, fmt, block, dim))
    return out[0], out[1]


def kv_decode(
    machine: Machine, batch: int, heads: int, kv_heads: int, tokens: int, dim: int = 128
) -> dict[str, Contestant]:
    """Attention of one new token over ``tokens`` packed ones and a window, by pairs, and over the same at 16 bits."""
    from bitatlas.kernels.triton_kv import decode_attention

    crowd = len(PAIRS) + 2
    q = torch.randn(batch, heads, dim, device=machine.device).bfloat16()
    window = [torch.randn(batch, kv_heads, _WINDOW, dim, device=machine.device).bfloat16() for _ in range(2)]
    beside = 2 * batch * kv_heads * _WINDOW * dim * 2

    def packed(name: str) -> Make:
        def make() -> Contestant:
            pair = parse_pair(name)
            nbytes = beside + batch * sum(f.packed_bytes(tokens, kv_heads, dim, 32) for f in pair)
            copies = machine.copies(nbytes, crowd)
            held = [cached(machine, pair, batch, kv_heads, tokens, dim) for _ in range(copies)]
            return Contestant(lambda i: decode_attention(q, *held[i], *window, dim**-0.5), copies, nbytes)

        return make

    def plain(layout: str) -> tuple[list[list[Tensor]], int]:
        shape = (batch, kv_heads, tokens + _WINDOW, dim) if layout == "heads first" else (batch, tokens + _WINDOW, kv_heads, dim)  # fmt: skip
        nbytes = 2 * batch * kv_heads * (tokens + _WINDOW) * dim * 2
        copies = machine.copies(nbytes, crowd)
        return [
            [torch.randn(shape, device=machine.device, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(copies)
        ], nbytes

    def sdpa() -> Contestant:
        held, nbytes = plain("heads first")
        return Contestant(
            lambda i: F.scaled_dot_product_attention(q.unsqueeze(2), *held[i], enable_gqa=True),
            len(held),
            nbytes,
        )

    def flash() -> Contestant:
        try:  # FlashAttention 3, for Hopper, or 2
            from flash_attn_interface import flash_attn_with_kvcache
        except ImportError:
            from flash_attn import flash_attn_with_kvcache

        held, nbytes = plain("tokens first")
        query = q.unsqueeze(1)
        return Contestant(lambda i: flash_attn_with_kvcache(query, *held[i]), len(held), nbytes)

    makes = {f"bitatlas {name}": packed(name) for name in PAIRS} | {
        "torch sdpa bf16": sdpa,
        "flash-attn bf16": flash,
    }
    return contestants(makes, f"kv decode {batch} x {tokens}")


# Row 4


def packing(machine: Machine, n: int, k: int) -> dict[str, Contestant]:
    """Packing, unpacking and dequantising by width, K/V packing, and a plain copy as the limit."""
    from bitatlas.kernels.triton_kv import pack_kv
    from bitatlas.kernels.triton_linear import dequantize
    from bitatlas.kernels.triton_pack import pack_codes, unpack_codes

    crowd = 3 * len(BITS) + 5
    device = machine.device

    def codes(bits: int) -> Make:
        def make() -> Contestant:
            nbytes = n * k + n * packed_words(k, bits) * 4
            held = [
                torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device)
                for _ in range(machine.copies(nbytes, crowd))
            ]
            return Contestant(lambda i: pack_codes(held[i], bits), len(held), nbytes)

        return make

    def words(bits: int) -> Make:
        def make() -> Contestant:
            nbytes = n * k + n * packed_words(k, bits) * 4
            shape = (n, packed_words(k, bits))
            held = [_random_words(shape, device) for _ in range(machine.copies(nbytes, crowd))]
            return Contestant(lambda i: unpack_codes(held[i], bits, k), len(held), nbytes)

        return make

    def dense(bits: int) -> Make:
        def make() -> Contestant:
            fmt = FORMATS[f"int{bits}-g64"]
            nbytes = fmt.payload_bytes(n, k) + 2 * n * k
            held = [weight(fmt, n, k, device) for _ in range(machine.copies(nbytes, crowd))]
            return Contestant(lambda i: dequantize(held[i], torch.bfloat16), len(held), nbytes)

        return make

    def kv(name: str) -> Make:
        def make() -> Contestant:
            fmt, heads, dim = parse_pair(name).k, 8, min(128, k)
            tokens = max(n * k // heads // dim // 32 * 32, 32)
            nbytes = heads * tokens * dim * 2 + fmt.packed_bytes(tokens, heads, dim, 32)
            held = [
                torch.randn(1, heads, tokens, dim, device=device).bfloat16()
                for _ in range(machine.copies(nbytes, crowd))
            ]
            return Contestant(lambda i: pack_kv(held[i], fmt, 32), len(held), nbytes)

        return make

    def copy() -> Contestant:
        nbytes = 4 * n * k  # of bf16, read and written
        held = [torch.empty(n, k, dtype=torch.bfloat16, device=device) for _ in range(machine.copies(nbytes, crowd))]  # fmt: skip
        return Contestant(lambda i: held[i].clone(), len(held), nbytes)

    makes: dict[str, Make] = {"copy": copy}
    for bits in BITS:
        makes |= {f"pack W{bits}": codes(bits), f"unpack W{bits}": words(bits), f"dequantize W{bits}": dense(bits)}  # fmt: skip
    makes |= {
        f"kv pack {name}": kv(name) for name in ("kv8-token", "kv4-token", "kv4-channel", "kv2-channel")
    }
    return contestants(makes, f"packing {n}x{k}")
