"""Commands about engines and kernels: export, check, bench-kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitatlas.app.cli_io import emit
from bitatlas.app.cli_options import DEFAULT_FORMATS, Formats, Json
from bitatlas.app.problems import guarded

__all__ = ["bench_kernels", "check", "export"]


@guarded
def export(
    allocation: Path, target: Annotated[str, typer.Option("--target", help="`bitatlas targets` lists them.")],
    output: Annotated[Path, typer.Option("-o", "--output")],
    model: Annotated[str | None, typer.Option(help="Only when the store does not know the model.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="The finished checkpoint, not the config alone.")] = False,
    quantizer: Annotated[str, typer.Option(help="With --weights: how codes are chosen: rtn, mse, gptq, awq.")] = "rtn",
    calibration: Annotated[str | None, typer.Option(help="Text for the quantizer, llama.cpp's imatrix or GPTQModel.")] = None,
    tokens: int = 16384, seq_len: int = 512, json_output: Json = False,
) -> None:  # fmt: skip
    """Write what an engine needs, and the command to run."""
    from bitatlas.app import tasks

    result = tasks.export(allocation, target, output, model=model, weights=weights, quantizer=quantizer,
                          calibration=calibration, tokens=tokens, seq_len=seq_len)  # fmt: skip
    emit(result, json_output, "export")


@guarded
def check(
    allocation: Path, target: Annotated[str | None, typer.Option("--target", help="All engines without.")] = None,
    model: str | None = None,
    repair: Annotated[Path | None, typer.Option(help="Write the plan with the smallest change that makes it servable.")] = None,
    json_output: Json = False,
) -> None:  # fmt: skip
    """Would this engine load it? servable / loads but decodes wrong / rejected, with the reason and what to change."""
    from bitatlas.app import tasks

    if repair is not None:
        emit(tasks.repair(allocation, target or "", repair, model=model), json_output, "export")
        return
    answer = tasks.check(allocation, target, model=model)
    emit(answer, json_output, "export" if target else "engines")


@guarded
def bench_kernels(
    model: Annotated[str | None, typer.Argument(help="Whose shapes; those of a small Llama without.")] = None,
    formats: Formats = DEFAULT_FORMATS + ",bf16",
    batch: Annotated[str, typer.Option(help="Rows of the input, a comma list.")] = "1,8",
    out: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
    import_: Annotated[
        Path | None,
        typer.Option("--import", help="Take this table (of another machine) instead of measuring."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Latency of every (shape, format, batch) on this machine, kept for `solve --latency-ms`."""
    from bitatlas.app import tasks

    table = tasks.bench_kernels(model, formats=formats, batches=batch, out=out, import_=import_)
    emit(table if json_output else table["rows"], json_output, "table")
