"""Timing our kernels on this machine: the latency table that `solve --latency-ms` decides by."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Format, UserError, expand_formats
from bitatlas.app.side_budgets import LATENCY_SCHEMA, read_latency
from bitatlas.app.tasks.models import open_index
from bitatlas.cache.paths import Home, atomic_write, write_output

__all__ = ["bench_kernels"]

_SHAPES = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))  # a Llama of a billion weights
_SECONDS = 0.02  # of samples per product, after the first call
_MOST = 200


def bench_kernels(
    model: str | Path | None = None,
    *,
    formats: str | tuple[str, ...] = "int{2,3,4,5,6,8}-g64,bf16",
    batches: str = "1,8",
    out: str | Path | None = None,
    import_: str | Path | None = None,
) -> dict[str, Any]:
    """Time a packed product for every (shape, format, batch); kept in the data folder, rows of other shapes stay.

    Random weights; the median of repeated calls. On a GPU, if there is one, else on the CPU with torch's threads.

    Args:
        model: whose shapes; those of a small Llama without.
        batches: rows of the input, a comma list.
        out: also write the table here. import_: keep this table instead of measuring.

    Raises:
        UserError: not a list of numbers, not such a table.
    """
    home = Home.default()
    if import_ is not None:
        table = read_latency(home, Path(import_).expanduser())
    else:
        try:
            rows_of = sorted({int(b) for b in batches.split(",")})
            assert min(rows_of) > 0
        except (ValueError, AssertionError):
            raise UserError("batches are positive numbers", found=repr(batches), fix="--batch 1,8") from None
        shapes = sorted({(u.rows, u.cols) for u in open_index(model).units}) if model else _SHAPES
        table = _measure(tuple(shapes), expand_formats(formats), rows_of)
        path = home.folder() / "latency.json"
        if path.is_file() and (old := read_latency(home))["device"] == table["device"]:
            new = {_key(r) for r in table["rows"]}
            table["rows"] = [r for r in old["rows"] if _key(r) not in new] + table["rows"]
    text = json.dumps(table, indent=1).encode() + b"\n"
    atomic_write(home.folder() / "latency.json", text)
    if out is not None:
        write_output(out, text)
    return table


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["rows"], row["cols"], row["format"], row["batch"]


def _measure(
    shapes: tuple[tuple[int, int], ...], formats: tuple[Format, ...], batches: list[int]
) -> dict[str, Any]:
    import torch

    from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
    from bitatlas.kernels.packed.modules import packed_linear
    from bitatlas.kernels.reference import quantize

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    name = torch.cuda.get_device_name() if gpu else f"{_processor()}, {torch.get_num_threads()} threads"
    wait: Callable[[], Any] = torch.cuda.synchronize if gpu else lambda: None
    rows = []
    with torch.no_grad():
        for shape in shapes:
            weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
            for fmt in formats:
                matrix = PackedMatrix(fmt, *shape, pack_weight(weight, fmt, quantize)).to(device)
                for batch in batches:
                    x = torch.randn(batch, shape[1]).to(device, dtype)
                    us = _time(lambda x=x, matrix=matrix: packed_linear(x, matrix), wait)  # type: ignore[misc]
                    rows.append(
                        {"rows": shape[0], "cols": shape[1], "format": fmt.name, "batch": batch, "us": us}
                    )
    return {"schema": LATENCY_SCHEMA, "device": name, "rows": rows}


def _time(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Median microseconds of a call."""
    call()
    wait()
    samples: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while len(samples) < 3 or (time.perf_counter() < stop and len(samples) < _MOST):
        start = time.perf_counter()
        call()
        wait()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
