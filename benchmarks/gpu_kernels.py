"""Our Triton kernels beside cuBLAS, gemlite and torchao on the GPU at hand; also measures the launch settings.

python benchmarks/gpu_kernels.py [--tune] [--shapes 4096x4096,8192x8192] [--rows 1,8,16,64,256]

The rule: everything in one process, replayed from CUDA graphs, weights rotating through more than four times the level-2
cache, the contestants interleaved, median of 200; bytes are those of the packed weights with their scales. A peer that is
not installed, or cannot do a case, is left out with its reason. Results are appended as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitatlas.kernels import tuned
from bitatlas.kernels.formats import FORMATS, Format
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
from bitatlas.kernels.reference import quantize

Run = Callable[[int], Any]
"""Multiplies with the copy of this number."""

REPLAYS = 200
BITS = (2, 3, 4, 5, 6, 8)


def copies_for(nbytes: int) -> int:
    """How many copies of a weight make more than four times the level-2 cache, 64 at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(64, 4 * cache // max(nbytes, 1) + 1)


def graphs_of(run: Run, copies: int) -> torch.cuda.CUDAGraph:
    """One graph of all copies in turn, warmed up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(copies, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return graph


def interleaved(runs: dict[str, tuple[Run, int]], replays: int = REPLAYS) -> dict[str, float]:
    """Median microseconds of one product for each contestant (its run, its copies)."""
    graphs = {name: (graphs_of(run, copies), copies) for name, (run, copies) in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # A graph holds all copies, so replays of it are fewer.
    for _ in range(max(5, replays // min(c for _, c in graphs.values()))):
        for name, (graph, copies) in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1e3 / copies)
    return {name: statistics.median(s) for name, s in samples.items()}


def packed(fmt: Format, n: int, k: int, copies: int) -> list[PackedMatrix]:
    """Copies of one packed random weight."""
    tensors = pack_weight(torch.randn(n, k), fmt, quantize)
    first = PackedMatrix(fmt, n, k, tensors).cuda()
    return [
        first,
        *(
            PackedMatrix(fmt, n, k, {name: t.clone() for name, t in _buffers(first).items()})
            for _ in range(copies - 1)
        ),
    ]


def _buffers(matrix: PackedMatrix) -> dict[str, torch.Tensor]:
    return {name: b.view(torch.float16) if name == "scales" else b for name, b in matrix.named_buffers()}


def cublas(n: int, k: int, x: torch.Tensor) -> tuple[Run, int]:
    """A dense product in the input's dtype."""
    copies = copies_for(n * k * 2)
    weights = [torch.randn(n, k, dtype=x.dtype, device="cuda") for _ in range(copies)]
    return lambda i: x @ weights[i].T, copies


def torchao_int4(n: int, k: int, x: torch.Tensor) -> tuple[Run, int]:
    """torchao's int4 weight-only linear, groups of 64."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    copies = copies_for(n * k // 2)
    layers = [torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    for layer in layers:
        quantize_(layer, Int4WeightOnlyConfig(group_size=64))
    return lambda i: layers[i](x), copies


def gemlite_of(bits: int) -> Callable[[int, int, torch.Tensor], tuple[Run, int]]:
    """gemlite's A16Wn linear, groups of 64."""

    def make(n: int, k: int, x: torch.Tensor) -> tuple[Run, int]:
        from gemlite.core import DType, GemLiteLinear

        copies = copies_for(n * k * bits // 8)
        layers = []
        for _ in range(copies):
            layer = GemLiteLinear(W_nbits=bits, group_size=64, in_features=k, out_features=n,
                                  input_dtype=DType.BF16, output_dtype=DType.BF16)  # fmt: skip
            codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda")
            scales = torch.rand(n, k // 64, dtype=torch.bfloat16, device="cuda")
            layer.pack(codes, scales, torch.full_like(scales, 1 << (bits - 1)), None)
            layers.append(layer)
        return lambda i: layers[i](x), copies

    return make


def tune(fmt: Format, n: int, k: int, x: torch.Tensor, matrices: list[PackedMatrix]) -> dict[str, Any]:
    """The fastest launch of the fused kernel, as a row of `kernels.tuned`."""
    from bitatlas.kernels.triton_linear import linear_fused

    m, group = x.shape[0], fmt.group_size or k
    best, won = float("inf"), {}
    for rows in (16, 32, 64) if m > 16 else (16,):
        for n_tile in (32, 64, 128):
            for step in (s for s in (32, 64, 128) if group % s == 0):
                for splits in (1, 2, 4, 8, 16):
                    tile = (rows, n_tile, step)

                    def run(i: int, tile: Any = tile, splits: int = splits) -> Any:
                        return linear_fused(x, matrices[i], tile=tile, splits=splits)

                    try:
                        us = interleaved({"": (run, len(matrices))}, replays=1)[""]
                    except Exception as error:  # noqa: BLE001 - out of shared memory, or a tile the compiler refuses
                        print(f"{tile} x {splits}: {type(error).__name__}", file=sys.stderr)
                        continue
                    if us < best:
                        best, won = us, {"tile": list(tile), "splits": splits}
    return {"bits": fmt.bits, "group": fmt.group_size or 0, "n": n, "k": k, "m": tuned.bucket(m), **won}


def dense_case(n: int, k: int, m: int, tuning: bool, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All widths and peers for one shape and number of rows; returns what was tuned."""
    from bitatlas.kernels.triton_linear import linear

    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    settings = []
    for bits in BITS:
        fmt = FORMATS[f"int{bits}-g64"]
        nbytes = fmt.payload_bytes(n, k)
        matrices = packed(fmt, n, k, copies_for(nbytes))
        if tuning:
            found = tune(fmt, n, k, x, matrices)
            if "tile" in found:
                settings.append(found)
                _keep([found])
        peers: dict[str, Callable[[int, int, torch.Tensor], tuple[Run, int]]] = {
            "cublas": cublas,
            "gemlite": gemlite_of(bits),
        }
        if bits == 4:
            peers["torchao"] = torchao_int4
        runs: dict[str, tuple[Run, int]] = {
            "bitatlas": (lambda i, ms=matrices: linear(x, ms[i]), len(matrices))
        }  # type: ignore[misc]
        for name, make in peers.items():
            try:
                runs[name] = make(n, k, x)
                runs[name][0](0)
            except Exception as error:  # noqa: BLE001 - not installed, or not for this case: said and left out
                runs.pop(name, None)
                print(
                    f"{name} W{bits} {n}x{k}: left out ({type(error).__name__}: {str(error)[:100]})",
                    file=sys.stderr,
                )
        for name, us in interleaved(runs).items():
            size = 2 * n * k if name == "cublas" else nbytes
            rows.append({"what": "linear", "kernel": name, "bits": 16 if name == "cublas" else bits, "against": bits, "n": n, "k": k,
                         "m": m, "us": us, "gb_per_s": size / us / 1e3})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return settings


def experts_case(
    n: int, k: int, m: int, rows: list[dict[str, Any]], experts: int = 64, top_k: int = 8
) -> None:
    """Experts of 2, 3, 4 and 8 bits in one launch, against uniform ones, by the same routing."""
    from bitatlas.kernels.triton_experts import ExpertTable, grouped_linear, route

    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    chosen = torch.stack([torch.randperm(experts, device="cuda")[:top_k] for _ in range(m)])
    runs: dict[str, tuple[Run, int]] = {}
    for name, kinds in {"mixed": (2, 3, 4, 8), **{f"uniform {b}": (b,) for b in (2, 3, 4, 8)}}.items():
        matrices = [packed(FORMATS[f"int{kinds[e % len(kinds)]}-g64"], n, k, 1)[0] for e in range(experts)]
        table = ExpertTable.build(matrices)
        routing = route(chosen, table)
        runs[name] = (lambda i, t=table, r=routing: grouped_linear(x, r.token, r, t), 4)  # type: ignore[misc]
    times = interleaved(runs)
    share = statistics.mean(times[f"uniform {b}"] for b in (2, 3, 4, 8))
    for name, us in times.items():
        rows.append({"what": "experts", "kernel": name, "n": n, "k": k, "m": m, "experts": experts, "top_k": top_k, "us": us,
                     "over_mean_of_uniform": us / share})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)


def _keep(settings: list[dict[str, Any]]) -> None:
    """Merge tuned rows into this GPU's file, so that the next launch uses them."""
    path = tuned.folder() / f"{tuned.slug(torch.cuda.get_device_name(0))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    have = {
        tuple(r[k] for k in ("bits", "group", "n", "k", "m")): r
        for r in (json.loads(path.read_text()) if path.is_file() else [])
    }
    have |= {tuple(r[k] for k in ("bits", "group", "n", "k", "m")): r for r in settings}
    path.write_text("[\n" + ",\n".join(json.dumps(r) for _, r in sorted(have.items())) + "\n]\n")
    tuned.read.cache_clear()


def main() -> None:
    """Check for a GPU, tune when asked, time, append."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--tune", action="store_true", help="measure launch settings first and keep them")
    parser.add_argument("--shapes", default="4096x4096,8192x8192")
    parser.add_argument("--rows", default="1,8,16,64,256")
    parser.add_argument("--out", default="benchmarks/results/gpu_kernels.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "there is no GPU that torch can use here; the GPU tests and benchmarks need one", file=sys.stderr
        )
        raise SystemExit(2)
    if args.check:
        print(torch.cuda.get_device_name(0))
        return
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            for m in map(int, args.rows.split(",")):
                dense_case(n, k, m, args.tune, rows)
        for m in (1, 16, 64):
            experts_case(768, 2048, m, rows)
    about = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as f:
        f.writelines(json.dumps({**about, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
