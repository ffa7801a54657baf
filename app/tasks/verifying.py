"""Verifying: the allocation for real, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app.tasks.jobs import status_dict, submit, submit_and_wait
from bitatlas.app.tasks.measuring import calibration_file, file_digest
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.solving import read_allocation
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["submit_verify", "verify"]

Named = str | Path | Allocation


def submit_verify(
    model: str | Path,
    allocations: Named | Iterable[Named],
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    seed: int = 0,
) -> str:
    """Start (or join) the verification of one or several allocations; returns the job's id.

    Raises:
        UserError: allocation of another model, no text.
    """

    index = register(model)
    store = Store(Home.default())
    named = [allocations] if isinstance(allocations, str | Path | Allocation) else list(allocations)
    ids = []
    for item in named:
        allocation = item if isinstance(item, Allocation) else read_allocation(item)
        allocation.check_model(index)
        ids.append(store.put_allocation(allocation))
    if not ids:
        raise UserError("no allocation was named", fix="bitatlas verify MODEL allocation.json")
    file = calibration_file(index.path, text, "eval")
    if file is None:
        raise UserError(
            "verifying needs a held-out text",
            found="none was named",
            fix="--text FILE, not the calibration text",
        )
    params = {
        "model": index.path, "digest": index.digest, "allocations": list(dict.fromkeys(ids)), "text": str(file),
        "text_sha": file_digest(file), "tokens": tokens, "seq_len": seq_len, "seed": seed,
    }  # fmt: skip
    return submit("verify", params, f"verify {len(set(ids))} allocation(s) of {index.name}")


def verify(
    model: str | Path,
    allocations: Named | Iterable[Named],
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    seed: int = 0,
    wait: bool = True,
    on_progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """KL mean/p50/p99 (nats per token), top-1 flips, perplexity before and after, noise floor.

    Returns:
        With ``wait`` the result (``results``: one entry per allocation), else the job's status.
    """
    job = submit_verify(model, allocations, text=text, tokens=tokens, seq_len=seq_len, seed=seed)
    status = submit_and_wait(job, wait, on_progress)
    return status.result if wait and status.result else status_dict(status)
