"""Commands that improve or find an allocation on the real model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitatlas.app.cli_io import emit, progress_printer
from bitatlas.app.cli_options import (
    Batch,
    Bits,
    Bytes,
    Context,
    Damage,
    ExpertGrouping,
    ExpertTies,
    Fit,
    GroupLimits,
    Json,
    KvBits,
    KvPlan,
    Model,
    Pins,
    RareBelow,
    RareFloor,
    Reserve,
    Seed,
    SolveFormats,
    Target,
    Wait,
)
from bitatlas.app.problems import guarded

__all__ = ["refine", "search"]


@guarded
def refine(
    model: Model,
    allocation: Path,
    output: Annotated[Path, typer.Option("-o", "--output")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text or JSONL file; the demo brings its own.")
    ] = None,
    tokens: int = 8192,
    seq_len: int = 256,
    rounds: int = 8,
    seed: Seed = 77,
    json_output: Json = False,
) -> None:
    """Improve an allocation on the real model, within the same bytes; only what measured KL confirms is kept."""
    from bitatlas.app import tasks

    result = tasks.refine(
        model, allocation, calibration=calibration, tokens=tokens, seq_len=seq_len, rounds=rounds, seed=seed, output=output,
        on_progress=progress_printer(json_output),
    )  # fmt: skip
    emit(tasks.describe_allocation(result, output), json_output, "allocation")


@guarded
def search(
    model: Model,
    solver: Annotated[str, typer.Option("--solver", help="`bitatlas solvers` lists the searches.")] = "path",
    metric: Damage = "",
    bits: Bits = None,
    bytes_: Bytes = None,
    fit: Fit = None,
    context: Context = 0,
    batch: Batch = 1,
    kv_bits: KvBits = 16,
    kv_plan: KvPlan = "",
    reserve: Reserve = "256MiB",
    formats: SolveFormats = None,
    pin: Pins = None,
    target: Target = None,
    expert_groups: ExpertGrouping = "",
    group_limit: GroupLimits = None,
    rare_floor: RareFloor = "",
    rare_below: RareBelow = 1,
    expert_ties: ExpertTies = "free",
    calibration: Annotated[Path | None, typer.Option(help="Text or JSONL file; the demo brings its own.")] = None,
    tokens: Annotated[int, typer.Option(help="Pool of text; minibatches are drawn from it.")] = 65536,
    seq_len: int = 256,
    generations: Annotated[int | None, typer.Option(help="Generations, rounds or steps; default: the search's own.")] = None,
    start: Annotated[list[Path] | None, typer.Option(help="Allocation file to begin with, repeatable.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy file; with --generations 0 applied as it is.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the search.")] = None,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16: faster, and blurs KLs below about 1e-3.")] = "float32",
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the allocation.")] = None,
    wait: Wait = True,
    json_output: Json = False,
) -> None:  # fmt: skip
    """Search on the real model. A durable job; every candidate is a row of the store and keeps to all limits."""
    from bitatlas.app import tasks
    from bitatlas.app.expert_rules import ExpertRules

    chosen = tasks.parse_settings(set_ or [])
    most = tasks.search_tokens(
        solver, tokens=tokens, steps=generations, settings=chosen, starts=len(start or [])
    )
    if most is not None and not json_output:
        print(f"{solver}: at most {most:,} forward-equivalent tokens", file=sys.stderr)
    for note in tasks.text_notes(solver, tokens, chosen, len(start or [])) if not json_output else ():
        print(f"note: {note}", file=sys.stderr)
    result = tasks.search(
        model, solver=solver, metric=metric, bits=bits, bytes_=bytes_, fit=fit, context=context, batch=batch,
        kv_bits=kv_bits, kv_plan=kv_plan, reserve=reserve, formats=formats, pins=pin or [], target=target,
        calibration=calibration, tokens=tokens, seq_len=seq_len, steps=generations, start=start or [], policy=policy,
        settings=chosen, seed=seed, precision=precision, output=output, wait=wait,
        experts=ExpertRules(expert_groups, tuple(group_limit or ()), rare_floor, rare_below, expert_ties), on_progress=progress_printer(json_output),
    )  # fmt: skip
    if isinstance(result, dict):
        emit(result, json_output, "job")
    else:
        emit(tasks.describe_allocation(result, output), json_output, "allocation")
