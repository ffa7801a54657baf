"""The truth that metrics are judged by: single flips and random whole allocations, measured on text of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bitatlas.analysis.context_length import check_length
from bitatlas.analysis.schema import UserError, expand_formats
from bitatlas.app.tasks.jobs import submit, submit_and_wait
from bitatlas.app.tasks.measuring import calibration_file, file_digest, submit_measure
from bitatlas.app.tasks.models import register

__all__ = ["submit_random_allocations", "truth"]

FLIP_FORMATS = "int{2,3,4}-g64"
ALLOCATION_FORMATS = "int{2,3,4,5,6,8}-g64"


def submit_random_allocations(
    model: str | Path,
    *,
    text: str | Path | None = None,
    n: int = 64,
    formats: str | Iterable[str] = ALLOCATION_FORMATS,
    low: float = 2.5,
    high: float = 5.0,
    tokens: int = 2048,
    seq_len: int = 128,
    seed: int = 0,
    cache_gib: float = 4.0,
) -> str:
    """Start (or join) the measurement of ``n`` random allocations of ``low`` to ``high`` bits; returns the job's id.

    Raises:
        UserError: no text, no such model.
    """
    index = register(model)
    file = calibration_file(index.path, text, "eval")
    if file is None:
        raise UserError("the truth needs a text", found="none was named",
                        fix="--text FILE, not the calibration text of the metrics")  # fmt: skip
    check_length(index, seq_len)  # what only deserves a note stands in the job's log
    params = {
        "model": index.path, "digest": index.digest, "text": str(file), "text_sha": file_digest(file),
        "tokens": tokens, "seq_len": seq_len, "text_seed": 0, "n": n, "low": float(low), "high": float(high),
        "formats": [f.name for f in expand_formats(formats)], "seed": seed, "cache_gib": cache_gib,
    }  # fmt: skip
    return submit("random_allocations", params, f"{n} random allocations of {index.name}")


def truth(
    model: str | Path,
    *,
    text: str | Path | None = None,
    flips: int = 240,
    flip_formats: str | Iterable[str] = FLIP_FORMATS,
    allocations: int = 64,
    formats: str | Iterable[str] = ALLOCATION_FORMATS,
    low: float = 2.5,
    high: float = 5.0,
    tokens: int = 2048,
    seq_len: int = 128,
    seed: int = 0,
    wait: bool = True,
    on_progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Measured KL of ``flips`` single flips (0 = all) and ``allocations`` random whole allocations.

    Args:
        text: disjoint from the metrics' calibration text; the demo brings its own.
        flip_formats, formats: of the flips and of the allocations.
        tokens: of text, for each of the two.

    Returns:
        the ids of both jobs; with ``wait`` also what they found.
    """
    index = register(model)
    file = calibration_file(index.path, text, "eval")
    jobs = {
        "allocations": submit_random_allocations(
            model, text=text, n=allocations, formats=formats, low=low, high=high, tokens=tokens, seq_len=seq_len, seed=seed,
        ),
        "flips": submit_measure(
            model, "kl_flip", formats=flip_formats, calibration=file, tokens=tokens, seq_len=seq_len, seed=seed,
            settings={"flips": flips, "flip_sequences": 0},
        ),
    }  # fmt: skip
    out: dict[str, Any] = {"jobs": jobs}
    if wait:
        for name, job in jobs.items():
            status = submit_and_wait(job, True, on_progress)
            out[name] = (status.result or {}).get("result", status.result)
    return out
