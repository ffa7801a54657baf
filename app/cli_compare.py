"""The command that sets two allocations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitatlas.app.cli_io import emit
from bitatlas.app.cli_options import Json, Model
from bitatlas.app.problems import guarded

__all__ = ["compare"]


@guarded
def compare(
    model: Model,
    a: Path,
    b: Path,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Whose damages to account the difference with.")
    ] = None,
    json_output: Json = False,
) -> None:
    """What changes from allocation A to B: units, bytes and damage by role, and how stable A's choice is."""
    from bitatlas.app import tasks

    found = tasks.compare(model, a, b, metric=metric)
    if not json_output:
        print(f"{found['title']}. {found['detail']}")
    emit(found if json_output else found["roles"], json_output, "table")
