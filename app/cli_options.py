"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DEFAULT_FORMATS",
    "Formats",
    "Json",
    "Metric",
    "Model",
    "Pins",
    "Quantizer",
    "QuantizerText",
    "Solver",
    "Target",
    "Wait",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Model = Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, hub id, or `demo`.")]
Formats = Annotated[str, typer.Option("--formats", help="Comma list; braces expand: int{2,3,4}-g64.")]
Metric = Annotated[
    str,
    typer.Option(
        "--metric",
        help="`bitatlas metrics` lists them; a comma list, or `all` that apply, where several make sense.",
    ),
]
Solver = Annotated[str, typer.Option("--solver", help="`bitatlas solvers` lists them.")]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="REGEX=FORMAT, repeatable; later rules win.")]
Target = Annotated[
    str | None, typer.Option("--target", help="Solve or export for this engine; `bitatlas targets`.")
]
Wait = Annotated[bool, typer.Option("--wait/--detach", help="Show progress until the job is done.")]
Quantizer = Annotated[str, typer.Option("--quantizer", help="How codes are chosen: rtn, mse, gptq, awq.")]
QuantizerText = Annotated[
    Path | None, typer.Option("--calibration", help="Text for gptq, awq and mse; the demo brings its own.")
]
DEFAULT_FORMATS = "int{2,3,4,5,6,8}-g64"
