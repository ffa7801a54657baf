"""Refining: an allocation improved on the real model, accepted only where measured KL falls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app.tasks.jobs import submit, submit_and_wait
from bitatlas.app.tasks.measuring import calibration_file, file_digest
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.solving import read_allocation
from bitatlas.cache.paths import Home, atomic_write
from bitatlas.cache.store import Store

__all__ = ["refine", "submit_refine"]


def submit_refine(
    model: str | Path,
    allocation: str | Path | Allocation,
    *,
    calibration: str | Path | None = None,
    tokens: int = 4096,
    seq_len: int = 256,
    rounds: int = 4,
    seed: int = 77,
) -> str:
    """Start (or join) the refining job; returns its id.

    Raises:
        UserError: allocation of another model, one that no measurement stands behind, no text.
    """
    index = register(model)
    plan = allocation if isinstance(allocation, Allocation) else read_allocation(allocation)
    plan.check_model(index)
    store = Store(Home.default())
    settings = plan.provenance.settings
    run, formats = settings.get("run"), settings.get("formats")
    if not run or not formats:
        raise UserError(
            "no measurement stands behind this allocation",
            found=f"solver {plan.solver}",
            fix="refine one made by `bitatlas solve` on a metric",
        )
    if settings.get("target"):
        raise UserError(
            "this allocation was solved under an engine's ties, which refining does not know",
            fix="refine one solved without --target",
        )
    store.run(run)
    text = calibration_file(index.path, calibration)
    if text is None:
        raise UserError("refining needs a calibration text", found="none was named", fix="--calibration FILE")
    params = {
        "model": index.path, "digest": index.digest, "allocation": store.put_allocation(plan), "run": run, "formats": list(formats),
        "calibration": str(text), "calibration_sha": file_digest(text), "tokens": tokens, "seq_len": seq_len, "rounds": rounds, "seed": seed,
    }  # fmt: skip
    return submit("refine", params, f"refine {index.name} at {plan.bits_per_weight:.2f} bits")


def refine(
    model: str | Path,
    allocation: str | Path | Allocation,
    *,
    calibration: str | Path | None = None,
    tokens: int = 4096,
    seq_len: int = 256,
    rounds: int = 4,
    seed: int = 77,
    output: str | Path | None = None,
    on_progress: Callable[[Any], None] | None = None,
) -> Allocation:
    """A better allocation of the same budget, or the same one when nothing better was found.

    Half of the calibration sequences propose, the other half judges. Held-out text is for `verify`.
    """
    job = submit_refine(
        model, allocation, calibration=calibration, tokens=tokens, seq_len=seq_len, rounds=rounds, seed=seed
    )
    status = submit_and_wait(job, True, on_progress)
    refined = Store(Home.default()).allocation((status.result or {})["allocation"])
    if output is not None:
        atomic_write(Path(output).expanduser().resolve(), refined.to_json().encode())
    return refined
