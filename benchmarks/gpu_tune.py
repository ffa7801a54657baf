"""Launch settings of the kernels, measured on the GPU at hand and kept as `kernels.tuned` reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_cases import BITS, PAIRS, cached, weight
from gpu_timing import Contestant, Machine, Run, measure

from bitatlas.cache.paths import write_output
from bitatlas.kernels import tuned
from bitatlas.kernels.formats import FORMATS
from bitatlas.kernels.kv import parse_pair

__all__ = ["crossover", "fastest", "keep", "tune", "tune_experts", "tune_kv", "tune_linear", "tune_many_rows"]

_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # rows of the input between which fused and dense change places
_DRAWS = 16  # routings that the tiles of the grouped product are chosen on

Time = Callable[[Run, int], float]
"""Microseconds of a run with so many copies."""
Row = dict[str, Any]
_T = TypeVar("_T")


def clock(machine: Machine) -> Time:
    """The measuring rule with fewer samples: the differences that matter here are large."""
    quick = replace(machine, samples=min(machine.samples, 20))
    return lambda run, copies: measure(quick, {"": Contestant(run, copies, 0)})[""].p50


def fastest(options: Iterable[_T], time_of: Callable[[_T], float]) -> _T | None:
    """The option that takes the least time; one that cannot be launched is passed over."""
    best, won = float("inf"), None
    for option in options:
        try:
            us = time_of(option)
        except Exception as error:  # noqa: BLE001 - out of shared memory, or a tile the compiler refuses
            print(f"{option}: {type(error).__name__}", file=sys.stderr)
            continue
        if us < best:
            best, won = us, option
    return won


def tune_linear(machine: Machine, time: Time, bits: int, n: int, k: int, m: int) -> Row | None:
    """Tile and splits of the fused product of (m, k) with a packed (n, k)."""
    from bitatlas.kernels.triton_linear import linear_fused

    fmt = FORMATS[f"int{bits}-g64"]
    matrices = [weight(fmt, n, k, machine.device) for _ in range(machine.copies(fmt.payload_bytes(n, k), 4))]
    x = torch.randn(m, k, device=machine.device).bfloat16()
    rows = (16, 32, 64) if m > 16 else (16,)
    options = product(product(rows, (32, 64, 128), (32, 64)), (1, 2, 4, 8, 16))
    won = fastest(
        options,
        lambda o: time(lambda i: linear_fused(x, matrices[i], tile=o[0], splits=o[1]), len(matrices)),
    )
    if won is None:
        return None
    key = {"bits": bits, "group": fmt.group_size or 0, "n": n, "k": k, "m": tuned.bucket(m)}
    return {**key, "tile": list(won[0]), "splits": won[1]}


def crossover(sizes: Iterable[int], fused: Callable[[int], float], dense: Callable[[int], float]) -> int:
    """The smallest of the rising ``sizes`` from which on ``dense`` is never slower; twice the largest if it always is."""
    won: int | None = None
    size = 0
    for size in sizes:
        if dense(size) > fused(size):
            won = None
        elif won is None:
            won = size
    return won or 2 * size


def tune_many_rows(
    machine: Machine, time: Time, bits: int, n: int, k: int, sizes: Iterable[int] = _SIZES
) -> Row:
    """From how many rows of the input dequantising and a dense product beat the fused one."""
    from bitatlas.kernels.triton_linear import dequantize, linear_fused

    fmt = FORMATS[f"int{bits}-g64"]
    matrices = [weight(fmt, n, k, machine.device) for _ in range(machine.copies(fmt.payload_bytes(n, k), 4))]
    copies = len(matrices)

    def x(m: int) -> torch.Tensor:
        return torch.randn(m, k, device=machine.device).bfloat16()

    def fused(m: int) -> float:
        a = x(m)
        return time(lambda i: linear_fused(a, matrices[i]), copies)

    def dense(m: int) -> float:
        a = x(m)
        return time(lambda i: a @ dequantize(matrices[i], a.dtype).T, copies)

    rows = crossover(sizes, fused, dense)
    return {"what": "many_rows", "bits": bits, "n": tuned.bucket(n), "k": tuned.bucket(k), "rows": rows}


def tune_experts(machine: Machine, time: Time, n: int, k: int, m: int, count: int, top_k: int) -> Row | None:
    """Tile of the grouped product: pairs and rows of W, for experts of all widths and ``m`` tokens."""
    from bitatlas.kernels.triton_experts import ExpertTable, grouped_linear, route

    x = torch.randn(m, k, device=machine.device).bfloat16()
    # One layer, other experts every time; past the cache as far as the layer reaches.
    table = ExpertTable.build(
        [weight(FORMATS[f"int{(2, 3, 4, 8)[e % 4]}-g64"], n, k, machine.device) for e in range(count)]
    )
    chosen = [torch.rand(m, count, device=machine.device).topk(top_k).indices for _ in range(_DRAWS)]
    pairs = m * top_k

    def time_of(tile: tuple[int, int]) -> float:
        routes = [route(index, table, tile[0]) for index in chosen]
        return time(lambda i: grouped_linear(x, routes[i].token, routes[i], table, rows=tile[1]), _DRAWS)

    won = fastest(product((16, 32, 64) if pairs > 16 * count else (16,), (32, 64, 128)), time_of)
    key = {"what": "experts", "n": n, "k": k, "m": tuned.bucket(-(-pairs // count))}
    return None if won is None else {**key, "block": won[0], "rows": won[1]}


def tune_kv(
    machine: Machine, time: Time, pair: str, batch: int, heads: int, kv_heads: int, tokens: int, dim: int
) -> Row | None:
    """Over how many programs decode attention is split, and the tokens of a step."""
    from bitatlas.kernels.triton_kv import decode_attention

    formats = parse_pair(pair)
    nbytes = batch * sum(f.packed_bytes(tokens, kv_heads, dim, 32) for f in formats)
    held = [cached(machine, formats, batch, kv_heads, tokens, dim) for _ in range(machine.copies(nbytes, 4))]
    q = torch.randn(batch, heads, dim, device=machine.device).bfloat16()
    window = [torch.randn(batch, kv_heads, 32, dim, device=machine.device).bfloat16() for _ in range(2)]

    def time_of(o: tuple[int, int]) -> float:
        return time(lambda i: decode_attention(q, *held[i], *window, dim**-0.5, o[0], o[1]), len(held))

    chunks = [c for c in (128, 256, 512, 1024, 2048) if c < 2 * tokens] or [128]
    won = fastest(product(chunks, (16, 32, 64)), time_of)
    key = {"what": "kv", "k_bits": formats.k.bits, "v_bits": formats.v.bits, "dim": dim,
           "heads": tuned.bucket(batch * kv_heads), "tokens": tuned.bucket(tokens)}  # fmt: skip
    return None if won is None else {**key, "chunk": won[0], "tile": won[1]}


def keep(path: Path, row: Row | None) -> None:
    """Merge a row into a GPU's file, so that the next launch uses it."""
    if row is None:
        return
    have = {tuned.key_of(r): r for r in (json.loads(path.read_text()) if path.is_file() else [])}
    have[tuned.key_of(row)] = row
    write_output(
        path, ("[\n" + ",\n".join(json.dumps(r) for _, r in sorted(have.items())) + "\n]\n").encode()
    )
    tuned.read.cache_clear()


def tune(
    machine: Machine, path: Path, cases: Iterable[tuple[str, dict[str, int]]], time: Time | None = None
) -> None:
    """Measure and keep what the cases of the benchmark launch, one row at a time: what is found stays when time runs out.

    The fused product's tiles come before the crossover that hangs on them.
    """
    time = time or clock(machine)
    every = list(cases)
    for kind, c in every:
        if kind == "linear":
            for bits in BITS:
                keep(path, tune_linear(machine, time, bits, **c))
        elif kind == "experts":
            keep(path, tune_experts(machine, time, **c))
        elif kind == "kv":
            for pair in PAIRS:
                keep(path, tune_kv(machine, time, pair, **c))
    sizes = _SIZES if machine.device == "cuda" else (1, 2)
    for n, k in sorted({(c["n"], c["k"]) for kind, c in every if kind == "linear"}):
        for bits in BITS:
            keep(path, tune_many_rows(machine, time, bits, n, k, sizes))
