"""Verifying: the allocation for real, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Allocation, ModelIndex, UserError
from bitatlas.app.checks import check_new_tokens, check_text_size
from bitatlas.app.devices import check_place, place_params
from bitatlas.app.tasks.jobs import jobs_show, status_dict, submit, submit_and_wait
from bitatlas.app.tasks.measuring import calibration_file, file_digest
from bitatlas.app.tasks.models import fit_length, register
from bitatlas.app.tasks.solving import read_allocation
from bitatlas.cache.keys import digest
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["answers", "answers_of", "quantizer_params", "submit_answers", "submit_verify", "verify"]

Named = str | Path | Allocation


def submit_verify(
    model: str | Path,
    allocations: Named | Iterable[Named],
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    seed: int = 0,
    quantizer: str = "rtn",
    calibration: str | Path | None = None,
    calibration_tokens: int = 16384,
    calibration_seq_len: int = 512,
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Start (or join) the verification of one or several allocations or packed folders; returns the job's id.

    Args:
        model: the original.
        allocations: files, `Allocation` objects, or folders that `pack` wrote. Where an allocation plans the K/V cache,
            every position reads it in those formats, for a folder as for a file; the original keeps its own precision.
        text, tokens, seq_len, seed: the held-out text, and how much of it.
        quantizer: how codes are chosen; with the defaults the same as in `pack`. A packed folder brings its own.
        calibration, calibration_tokens, calibration_seq_len: text for quantisers that need one.
        device, dtype: where and in what the original and the rest compute; words of `app.devices`.

    Raises:
        UserError: allocation of another model, no text.
    """
    check_place(device, dtype)
    index = register(model)
    store = Store(Home.default())
    named = [allocations] if isinstance(allocations, str | Path | Allocation) else list(allocations)
    ids: list[str] = []
    packed: list[dict[str, str]] = []
    for item in named:
        if not isinstance(item, Allocation) and Path(item).expanduser().is_dir():
            packed.append(_packed(Path(item).expanduser().resolve(), index, store))
            continue
        allocation = item if isinstance(item, Allocation) else read_allocation(item)
        allocation.check_model(index)
        ids.append(store.put_allocation(allocation))
    if not ids and not packed:
        raise UserError("no allocation was named", fix="bitatlas verify MODEL allocation.json")
    file = calibration_file(index.path, text, "eval")
    if file is None:
        raise UserError(
            "verifying needs a held-out text",
            found="none was named",
            fix="--text FILE, not the calibration text",
        )
    fit_length(index, seq_len)
    params = {
        "model": index.path, "digest": index.digest, "allocations": list(dict.fromkeys(ids)), "text": str(file),
        "text_sha": file_digest(file), "tokens": tokens, "seq_len": seq_len, "seed": seed,
    }  # fmt: skip
    if packed:
        params["packed"] = packed
    params |= place_params(device, dtype, "float32")
    if quantizer != "rtn" and ids:
        params |= quantizer_params(index, quantizer, calibration, calibration_tokens, calibration_seq_len)
    return submit("verify", params, f"verify {len(set(ids)) + len(packed)} allocation(s) of {index.name}")


def quantizer_params(
    index: ModelIndex, quantizer: str, calibration: str | Path | None, tokens: int, seq_len: int
) -> dict[str, Any]:
    """What a job has to know about its quantiser: name, and the calibration text where one is needed.

    Raises:
        UserError: an unknown quantiser, no text, or an empty one.
    """
    from bitatlas.kernels.quantizers import get_quantizer

    params: dict[str, Any] = {"quantizer": quantizer}
    kind = get_quantizer(quantizer)
    if not (kind.NEEDS_INPUTS or kind.TAKES_INPUTS):
        return params
    text = calibration_file(index.path, calibration)
    if text is None and not kind.NEEDS_INPUTS:
        return params
    if text is None:
        raise UserError(f"{quantizer} needs a calibration text", found="none was named",
                        fix="--calibration FILE (text or JSONL)")  # fmt: skip
    check_text_size(tokens, seq_len)
    fit_length(index, seq_len)
    about = {"calibration": str(text), "calibration_sha": file_digest(text)}
    return params | about | {"calibration_tokens": tokens, "calibration_seq_len": seq_len}


def _packed(folder: Path, index: ModelIndex, store: Store) -> dict[str, str]:
    """A packed folder as part of a request: where, what it holds, the allocation that it was made from."""
    from bitatlas.kernels.packed.manifest import Manifest

    manifest = Manifest.read(folder)
    if manifest.model.get("digest") != index.digest:
        raise UserError(f"{folder} was packed from another model", found=manifest.model.get("name", "no name"),
                        fix=f"name the model that it came from, or pack {index.name} again")  # fmt: skip
    plan = read_allocation(folder / "allocation.json")
    plan.check_model(index)
    return {
        "folder": str(folder),
        "sha": digest(manifest.to_json()),
        "allocation": store.put_allocation(plan),
        # Earlier versions read K and V at 16 bits whatever the plan said: their results are of another request.
        **({"kv": "as planned"} if plan.kv else {}),
    }


def verify(
    model: str | Path,
    allocations: Named | Iterable[Named],
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    seed: int = 0,
    quantizer: str = "rtn",
    calibration: str | Path | None = None,
    calibration_tokens: int = 16384,
    calibration_seq_len: int = 512,
    device: str = "auto",
    dtype: str = "float32",
    wait: bool = True,
    on_progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """KL mean/p50/p99 (nats per token), top-1 flips, perplexity before and after, noise floor.

    Returns:
        With ``wait`` the result (``results``: one entry per allocation), else the job's status.
    """
    job = submit_verify(
        model, allocations, text=text, tokens=tokens, seq_len=seq_len, seed=seed, quantizer=quantizer,
        calibration=calibration, calibration_tokens=calibration_tokens, calibration_seq_len=calibration_seq_len,
        device=device, dtype=dtype,
    )  # fmt: skip
    status = submit_and_wait(job, wait, on_progress)
    return status.result if wait and status.result else status_dict(status)


def submit_answers(
    model: str | Path, packed: str | Path, prompts: Iterable[str], *, max_new_tokens: int = 96, device: str = "auto",
    dtype: str = "auto",
) -> str:  # fmt: skip
    """Start (or join) the side-by-side answers of a model and of what was packed from it; returns the job's id.

    ``device`` and ``dtype`` are words of `app.devices`.

    Raises:
        UserError: no prompts, or a folder that was packed from another model.
    """
    check_place(device, dtype)
    index = register(model)
    asked = [p.strip() for p in prompts if p.strip()]
    if not asked:
        raise UserError("no prompt was given", fix="one prompt a line")
    check_new_tokens(max_new_tokens)
    about = _packed(Path(packed).expanduser().resolve(), index, Store(Home.default()))
    params: dict[str, Any] = {
        "model": index.path, "digest": index.digest, "packed": about["folder"], "sha": about["sha"], "prompts": asked,
        "max_new_tokens": max_new_tokens, **({"kv": about["kv"]} if "kv" in about else {}), **place_params(device, dtype, "auto"),
    }  # fmt: skip
    return submit("answers", params, f"answers of {index.name} and {Path(about['folder']).name}")


def answers(
    model: str | Path,
    packed: str | Path,
    prompts: Iterable[str],
    *,
    max_new_tokens: int = 96,
    device: str = "auto",
    dtype: str = "auto",
    wait: bool = True,
    on_progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Both models' greedy answers, prompt by prompt, with changed refusals and the tail of KL where it was verified."""
    from bitatlas.app.work.answers import with_tail

    job = submit_answers(model, packed, prompts, max_new_tokens=max_new_tokens, device=device, dtype=dtype)
    status = submit_and_wait(job, wait, on_progress)
    return with_tail(status.result, Home.default()) if wait and status.result else status_dict(status)


def answers_of(job: str) -> dict[str, Any]:
    """What `answers` returns, of a job that is done."""
    from bitatlas.app.work.answers import with_tail

    return with_tail(jobs_show(job)["result"], Home.default())
