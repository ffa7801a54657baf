"""Commands that let a model speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitatlas.app.cli_io import emit, progress_printer, spoken_lines
from bitatlas.app.cli_options import Device, Dtype, Json, Model, Wait
from bitatlas.app.problems import guarded

__all__ = ["answers", "chat", "generate"]


@guarded
def generate(
    directory: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens")] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_output: Json = False,
) -> None:
    """Continue a prompt with a packed checkpoint (greedy)."""
    from bitatlas.app import tasks

    result = tasks.generate(directory, prompt, max_new_tokens=max_new_tokens, device=device, dtype=dtype)
    emit(result, json_output, "text")


@guarded
def chat(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any model.")],
    system: Annotated[str, typer.Option(help="What the model is told before you speak.")] = "",
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens")] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_output: Json = False,
) -> None:
    """Talk to a model, a line a turn (from the terminal or from a pipe); /reset starts anew, /quit ends."""
    from bitatlas.app import tasks

    said = tasks.chat(
        model, spoken_lines(sys.stdin, json_output), system=system, max_new_tokens=max_new_tokens,
        say=lambda text: None if json_output else print(text, flush=True),
        device=device, dtype=dtype,
    )  # fmt: skip
    if json_output:
        emit({"messages": said}, json_output, "job")


@guarded
def answers(
    model: Model, packed: Annotated[Path, typer.Argument(help="A folder that `pack` wrote.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="Repeatable.")],
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens")] = 96,
    device: Device = "auto", dtype: Dtype = "auto",
    wait: Wait = True, json_output: Json = False,
) -> None:  # fmt: skip
    """The original's and the packed model's answers side by side, with changed refusals."""
    from bitatlas.app import tasks

    result = tasks.answers(
        model,
        packed,
        prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        wait=wait,
        on_progress=progress_printer(json_output),
    )
    emit(result, json_output, "answers")
