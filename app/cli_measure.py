"""Commands that measure, and that say what measuring would cost."""

from __future__ import annotations

from typing import Annotated

import typer

from bitatlas.app.cli_io import emit, progress_printer, say_estimate
from bitatlas.app.cli_options import (
    DEFAULT_FORMATS,
    Calibration,
    Device,
    Formats,
    Json,
    Metric,
    Model,
    Options,
    Seed,
    SeqLen,
    TextMode,
    Tokens,
    Wait,
)
from bitatlas.app.problems import guarded

__all__ = ["estimate", "measure"]


@guarded
def measure(
    model: Model,
    metric: Metric = "fisher",
    formats: Formats = DEFAULT_FORMATS,
    calibration: Calibration = None,
    tokens: Tokens = 8192,
    seq_len: SeqLen = 128,
    seed: Seed = 0,
    text_mode: TextMode = "packed",
    set_: Options = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the model while it is measured: float32, bfloat16, float16.")
    ] = "float32",
    wait: Wait = False,
    json_output: Json = False,
) -> None:
    """Measure how much each unit is hurt by fewer bits. A durable job: resumes after anything."""
    from bitatlas.app import tasks

    result = tasks.measure(
        model, metric, formats=formats, calibration=calibration, tokens=tokens, seq_len=seq_len, seed=seed,
        settings=tasks.parse_settings(set_ or []), text_mode=text_mode, device=device, dtype=dtype, wait=wait,
        on_progress=progress_printer(json_output), on_estimate=None if json_output else say_estimate,
    )  # fmt: skip
    emit(result, json_output, "job")


@guarded
def estimate(
    model: Model, metric: Metric = "fisher", formats: Formats = DEFAULT_FORMATS, calibration: Calibration = None,
    tokens: Tokens = 8192, seq_len: SeqLen = 128, seed: Seed = 0, text_mode: TextMode = "packed", set_: Options = None,
    json_output: Json = False,
) -> None:  # fmt: skip
    """What measuring would cost: tokens forward and backward, bytes read, seconds on this machine."""
    from bitatlas.app import tasks

    rows = tasks.estimate(
        model, metric, formats=formats, calibration=calibration, tokens=tokens, seq_len=seq_len, seed=seed,
        settings=tasks.parse_settings(set_ or []), text_mode=text_mode,
    )  # fmt: skip
    emit(rows if json_output else [*rows, tasks.estimate_total(rows)], json_output, "table")
