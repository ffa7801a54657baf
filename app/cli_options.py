"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DEFAULT_FORMATS",
    "Batch",
    "Bits",
    "Bytes",
    "Calibration",
    "Context",
    "Damage",
    "Device",
    "Dtype",
    "ExpertGrouping",
    "ExpertTies",
    "Fit",
    "Formats",
    "GroupLimits",
    "Json",
    "KvBits",
    "KvMetric",
    "KvPlan",
    "Metric",
    "Model",
    "Options",
    "Pins",
    "Points",
    "Quantizer",
    "QuantizerText",
    "RareBelow",
    "RareFloor",
    "Reserve",
    "Seed",
    "SolveFormats",
    "SeqLen",
    "Solver",
    "Target",
    "TextMode",
    "Tokens",
    "Wait",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Model = Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, hub id, or `demo`.")]
Formats = Annotated[str, typer.Option("--formats", help="Comma list; braces expand: int{2,3,4}-g64.")]
Damage = Annotated[
    str,
    typer.Option(
        "--metric",
        help="A measured damage; by default fisher_anchored, fisher_scaled or fisher, the first that was measured.",
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        "--metric",
        help="`bitatlas metrics` lists them; a comma list, or `all` that apply, where several make sense.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text or JSONL file, datasets:NAME, or `self` (text sampled from the model)."),
]
Tokens = Annotated[int, typer.Option(help="Calibration tokens in all.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sequence.")]
TextMode = Annotated[str, typer.Option(help="packed, or document: one document a sequence.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE or METRIC.NAME=VALUE, an option of the metrics; repeatable."),
]
Solver = Annotated[str, typer.Option("--solver", help="`bitatlas solvers` lists them; solve takes mckp by default, ilp under further limits, hull under limits on groups.")]  # fmt: skip
Bits = Annotated[float | None, typer.Option(help="Effective bits per weight over the units.")]
Bytes = Annotated[
    str | None, typer.Option("--bytes", help="All weights, kept tensors included: 500MB, 123456.")
]
Fit = Annotated[str | None, typer.Option(help="Memory for weights + KV cache + reserve: 8GiB.")]
Context = Annotated[int, typer.Option(help="With --fit: context length in tokens; 0 = no KV cache.")]
Batch = Annotated[int, typer.Option(help="With --fit: sequences at once, at least 1.")]
KvBits = Annotated[float, typer.Option(help="With --fit: K and V of every layer at 16, 8, 4 or 2 bits.")]
KvPlan = Annotated[str, typer.Option(help="With --fit: bits of K/V by layer: 8/4, or 0-5=8/8;6-29=8/4.")]
KvMetric = Annotated[
    str, typer.Option(help="With --kv: kv_output, kv_fisher or kv_flip; the first that is measured.")
]
Reserve = Annotated[str, typer.Option(help="With --fit: activations and workspace.")]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="REGEX=FORMAT, repeatable; later rules win.")]
Target = Annotated[
    str | None, typer.Option("--target", help="Solve or export for this engine; `bitatlas targets`.")
]
Points = Annotated[int, typer.Option("--points", help="Most points of the front, at least 2.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random; 0 or more.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16, float16; auto = float32 on the CPU, else bfloat16."),
]
Wait = Annotated[bool, typer.Option("--wait/--detach", help="Show progress until the job is done.")]
Quantizer = Annotated[str, typer.Option("--quantizer", help="How codes are chosen: rtn, mse, gptq, awq.")]
QuantizerText = Annotated[
    Path | None, typer.Option("--calibration", help="Text for gptq, awq and mse; the demo brings its own.")
]
ExpertGrouping = Annotated[
    str,
    typer.Option(
        "--expert-groups", "--groups", help="layer, role, frequency:4, damage:4, cluster:6, regex:PATTERN."
    ),
]
GroupLimits = Annotated[
    list[str] | None,
    typer.Option("--group-limit", help="GROUP=BITS or GROUP=SIZE, repeatable: q1=2.5, q4=200MB, *=4."),
]
RareFloor = Annotated[str, typer.Option("--rare-floor", help="Rare experts get at least this format.")]
RareBelow = Annotated[
    int, typer.Option("--rare-below", help="Rare: reached by fewer tokens; 1 = never reached.")
]
ExpertTies = Annotated[
    str, typer.Option("--expert-ties", help="free, gate-up, expert or layer share a format.")
]
SolveFormats = Annotated[
    str | None,
    typer.Option(
        "--formats",
        help="Comma list; braces expand. int{2,3,4,5,6,8}-g64 without; with --target the measured ones that it takes.",
    ),
]
DEFAULT_FORMATS = "int{2,3,4,5,6,8}-g64"
