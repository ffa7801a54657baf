"""The command line. Each command is a thin face of the function of the same name in `bitatlas.app.tasks`.

Exit codes: 0 done, 2 the user's input, 1 our fault. Every command takes ``--json``: one document on stdout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitatlas.app.cli_compare import compare
from bitatlas.app.cli_io import emit, progress_printer
from bitatlas.app.cli_measure import estimate, measure
from bitatlas.app.cli_options import (
    DEFAULT_FORMATS,
    Batch,
    Bits,
    Bytes,
    Context,
    Damage,
    Device,
    Dtype,
    ExpertGrouping,
    ExpertTies,
    Fit,
    Formats,
    GroupLimits,
    Json,
    KvBits,
    KvMetric,
    KvPlan,
    Model,
    Pins,
    Points,
    Quantizer,
    QuantizerText,
    RareBelow,
    RareFloor,
    Reserve,
    Seed,
    SolveFormats,
    Solver,
    Target,
    Wait,
)
from bitatlas.app.cli_search import refine, search
from bitatlas.app.cli_shipping import bench_kernels, check, export
from bitatlas.app.cli_talk import answers, chat, generate
from bitatlas.app.problems import guarded

__all__ = ["app", "main"]

app = typer.Typer(
    name="bitatlas", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="An atlas of where a language model's bits matter, and a planner that spends them.",
)  # fmt: skip
jobs_app = typer.Typer(no_args_is_help=False, help="Background jobs: list, show, logs, cancel, resume.")
app.add_typer(jobs_app, name="jobs")
for command in (measure, estimate, refine, search, compare, generate, chat, answers, export, check):
    app.command()(command)
app.command("bench-kernels")(bench_kernels)


@app.command()
@guarded
def scan(model: Model, json_output: Json = False) -> None:
    """Units, roles, experts, shapes, parameters, bytes per format. Reads headers only."""
    from bitatlas.app import tasks

    emit(tasks.scan(model), json_output, "scan")


@app.command()
@guarded
def solve(
    model: Model,
    metric: Damage = "",
    solver: Solver = "",
    bits: Bits = None,
    bytes_: Bytes = None,
    fit: Fit = None,
    context: Context = 0,
    batch: Batch = 1,
    kv_bits: KvBits = 16,
    kv_plan: KvPlan = "",
    kv: Annotated[
        bool,
        typer.Option("--kv", help="With --fit: K and V of each layer share the budget with the weights."),
    ] = False,
    kv_metric: KvMetric = "",
    reserve: Reserve = "256MiB",
    formats: SolveFormats = None,
    pin: Pins = None,
    target: Target = None,
    seed: Seed = 0,
    latency_ms: Annotated[
        float | None, typer.Option(help="Linear layers of one decoding step, by `bench-kernels`.")
    ] = None,
    bops: Annotated[float | None, typer.Option(help="10^9 bit operations per token (HAWQ-V3).")] = None,
    active_bytes: Annotated[
        str | None, typer.Option(help="Weight bytes read in one decoding step: 900MB.")
    ] = None,
    expert_groups: ExpertGrouping = "",
    group_limit: GroupLimits = None,
    rare_floor: RareFloor = "",
    rare_below: RareBelow = 1,
    expert_ties: ExpertTies = "free",
    quantizer: Annotated[
        str, typer.Option(help="Only damage that was measured with this one; the newest without.")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, a setting of the solver (kvtuner: exact=false)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the allocation.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Spend a memory budget: unit -> format, with a certificate."""
    from bitatlas.app import tasks
    from bitatlas.app.expert_rules import ExpertRules

    result = tasks.solve(
        model, metric=metric, solver=solver, bits=bits, bytes_=bytes_, fit=fit, context=context, batch=batch,
        kv_bits=kv_bits, kv_plan=kv_plan, kv=kv, kv_metric=kv_metric, reserve=reserve, formats=formats, pins=pin or [], target=target, seed=seed, output=output,
        latency_ms=latency_ms, bops=bops, active_bytes=active_bytes, settings=tasks.parse_settings(set_ or []),
        experts=ExpertRules(expert_groups, tuple(group_limit or ()), rare_floor, rare_below, expert_ties), quantizer=quantizer,
    )  # fmt: skip
    emit(tasks.describe_allocation(result, output), json_output, "allocation")


@app.command()
@guarded
def frontier(
    model: Model, metric: Damage = "", solver: Solver = "hull", formats: SolveFormats = None,
    pin: Pins = None, target: Target = None, points: Points = 64, expert_groups: ExpertGrouping = "", group_limit: GroupLimits = None,
    rare_floor: RareFloor = "", rare_below: RareBelow = 1, expert_ties: ExpertTies = "free",
    kv: Annotated[bool, typer.Option("--kv", help="Of weights and K/V of each layer together, at --context and --batch.")] = False,
    kv_metric: KvMetric = "",
    context: Annotated[int, typer.Option(help="With --kv: tokens that the cache holds.")] = 0,
    batch: Annotated[int, typer.Option(help="With --kv: sequences at once.")] = 1,
    json_output: Json = False,
) -> None:  # fmt: skip
    """The whole front: the best predicted damage at every size, and what a token then reads; with --kv also how to share memory with the cache."""
    from bitatlas.app import tasks
    from bitatlas.app.expert_rules import ExpertRules

    rules = ExpertRules(expert_groups, tuple(group_limit or ()), rare_floor, rare_below, expert_ties)
    result = tasks.frontier(
        model,
        metric=metric,
        solver=solver,
        formats=formats,
        pins=pin or [],
        target=target,
        points=points,
        experts=rules,
        kv=kv,
        kv_metric=kv_metric,
        context=context,
        batch=batch,
    )
    emit(tasks.describe_frontier(result, model, target), json_output, "table")


@app.command()
@guarded
def verify(
    model: Model,
    allocation: Annotated[list[Path], typer.Argument(help="Allocation files, or folders that `pack` wrote.")],
    text: Annotated[Path | None, typer.Option(help="Held-out text; the demo brings its own.")] = None,
    tokens: int = 8192,
    seq_len: int = 256,
    seed: Seed = 0,
    quantizer: Quantizer = "rtn",
    calibration: QuantizerText = None,
    calibration_tokens: int = 16384,
    calibration_seq_len: int = 512,
    device: Device = "auto",
    dtype: Dtype = "float32",
    wait: Wait = True,
    json_output: Json = False,
) -> None:
    """Run the allocation for real: KL mean/p50/p99, top-1 flips, perplexity, noise floor."""
    from bitatlas.app import tasks

    result = tasks.verify(
        model, allocation, text=text, tokens=tokens, seq_len=seq_len, seed=seed, quantizer=quantizer,
        calibration=calibration, calibration_tokens=calibration_tokens, calibration_seq_len=calibration_seq_len,
        device=device, dtype=dtype, wait=wait, on_progress=progress_printer(json_output),
    )  # fmt: skip
    emit(result, json_output, "verify")


@app.command()
@guarded
def truth(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Not the metrics' calibration text; the demo brings its own.")] = None,
    flips: Annotated[int, typer.Option(help="Single flips, spread over units and formats; 0 = all.")] = 240,
    flip_formats: Annotated[str, typer.Option(help="Formats of the flips.")] = "int{2,3,4}-g64",
    allocations: Annotated[int, typer.Option(help="Random whole allocations.")] = 64,
    formats: Formats = DEFAULT_FORMATS,
    low: Annotated[float, typer.Option(help="Effective bits of the smallest allocation.")] = 2.5,
    high: Annotated[float, typer.Option(help="Of the largest.")] = 5.0,
    tokens: Annotated[int, typer.Option(help="Tokens of text, for each of the two.")] = 2048,
    seq_len: int = 128, seed: Seed = 0, wait: Wait = True, json_output: Json = False,
) -> None:  # fmt: skip
    """Measure what metrics are judged by: KL of single flips and of random whole allocations."""
    from bitatlas.app import tasks

    result = tasks.truth(
        model, text=text, flips=flips, flip_formats=flip_formats, allocations=allocations, formats=formats, low=low,
        high=high, tokens=tokens, seq_len=seq_len, seed=seed, wait=wait, on_progress=progress_printer(json_output),
    )  # fmt: skip
    emit(result, json_output, "job")


@app.command()
@guarded
def agree(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Where to write the whole table as CSV.")] = None,
    json_output: Json = False,
) -> None:
    """How far each measured metric can be trusted: against measured flips and whole allocations (`truth` measures them)."""
    from bitatlas.app import tasks

    emit(tasks.agree(model, out=out), json_output, "trust")


@app.command()
@guarded
def pack(
    model: Model, allocation: Path, output: Annotated[Path, typer.Option("-o", "--output")],
    quantizer: Quantizer = "rtn",
    calibration: QuantizerText = None,
    tokens: int = 16384, seq_len: int = 512, seed: Seed = 0, wait: Wait = True, json_output: Json = False,
) -> None:  # fmt: skip
    """Quantise and bit-pack into safetensors shards + bitatlas.json. Streaming, resumable."""
    from bitatlas.app import tasks

    result = tasks.pack(
        model, allocation, output, quantizer=quantizer, calibration=calibration, tokens=tokens, seq_len=seq_len,
        seed=seed, wait=wait, on_progress=progress_printer(json_output),
    )  # fmt: skip
    emit(result, json_output, "job")


@app.command()
@guarded
def metrics(json_output: Json = False) -> None:
    """What can be measured."""
    from bitatlas.app import tasks

    emit(tasks.metrics(), json_output, "table")


@app.command()
@guarded
def formats(json_output: Json = False) -> None:
    """Ways to store a matrix."""
    from bitatlas.app import tasks

    emit(tasks.formats(), json_output, "table")


@app.command()
@guarded
def solvers(json_output: Json = False) -> None:
    """Allocators."""
    from bitatlas.app import tasks

    emit(tasks.solvers(), json_output, "table")


@app.command()
@guarded
def targets(json_output: Json = False) -> None:
    """Engines that allocations can be exported to."""
    from bitatlas.app import tasks

    emit(tasks.targets(), json_output, "table")


@app.command()
@guarded
def demo(
    path: Annotated[bool, typer.Option("--path", help="Print the demo model's folder only.")] = False,
    json_output: Json = False,
) -> None:
    """Install the sample study of the embedded demo model; print where the model is."""
    from bitatlas.app import tasks

    if path and not json_output:
        print(tasks.demo_path())
        return
    emit(tasks.demo(), json_output, "job")


@app.command()
@guarded
def doctor(json_output: Json = False) -> None:
    """Is everything in order here? Versions, disk, store, worker, optional parts."""
    from bitatlas.app import doctor as module

    report = module.report()
    emit(report, json_output, "table")
    if any(line["state"] == "fail" for line in report):
        raise SystemExit(1)


@app.command()
@guarded
def rebuild(json_output: Json = False) -> None:
    """Make the results file again from the Parquet copies of finished results; the old file is moved aside."""
    from bitatlas.app import tasks

    emit(tasks.rebuild(), json_output, "job")


@app.command()
@guarded
def serve(
    model: Annotated[str | None, typer.Argument(help="Open on this checkpoint instead of the demo.")] = None,
    port: int = 8501,
) -> None:
    """The dashboard, on 127.0.0.1 only."""
    from bitatlas.app import serve as module

    module.serve(model, port)


@app.command()
@guarded
def worker(
    idle_minutes: Annotated[float, typer.Option(help="Exit after this long without work; 0 = stay.")] = 0.0,
) -> None:
    """Run queued jobs until stopped. The CLI and the dashboard start one on demand."""
    from bitatlas.app import worker as module

    raise SystemExit(module.main(["--idle-minutes", str(idle_minutes)] if idle_minutes else ["--stay"]))


@jobs_app.callback(invoke_without_command=True)
def jobs_default(ctx: typer.Context, json_output: Json = False) -> None:
    """List the jobs when no sub-command is named."""
    if ctx.invoked_subcommand is None:
        jobs_list(json_output=json_output)


@jobs_app.command("list")
@guarded
def jobs_list(json_output: Json = False) -> None:
    """All jobs, newest first."""
    from bitatlas.app import tasks

    emit(tasks.jobs_list(), json_output, "table")


@jobs_app.command("show")
@guarded
def jobs_show(job: str, json_output: Json = False) -> None:
    """One job: state, progress, ETA, result or error."""
    from bitatlas.app import tasks

    emit(tasks.jobs_show(job), json_output, "job")


@jobs_app.command("logs")
@guarded
def jobs_logs(job: str, tail: int = 50, json_output: Json = False) -> None:
    """The end of a job's log."""
    from bitatlas.app import tasks

    emit({"text": tasks.jobs_logs(job, tail)}, json_output, "text")


@jobs_app.command("cancel")
@guarded
def jobs_cancel(job: str, json_output: Json = False) -> None:
    """Stop a job; finished steps are kept."""
    from bitatlas.app import tasks

    emit(tasks.jobs_cancel(job), json_output, "job")


@jobs_app.command("resume")
@guarded
def jobs_resume(job: str, wait: Wait = False, json_output: Json = False) -> None:
    """Go on with a cancelled, failed or interrupted job at its first unfinished step."""
    from bitatlas.app import tasks

    emit(tasks.jobs_resume(job, wait=wait, on_progress=progress_printer(json_output)), json_output, "job")


def main(argv: list[str] | None = None) -> Any:
    """Entry point of the ``bitatlas`` command."""
    return app(args=argv)


if __name__ == "__main__":
    main()
