"""Shipping: pack, generate, check and export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import Allocation, ModelIndex, UserError
from bitatlas.app.checks import check_new_tokens
from bitatlas.app.devices import check_place
from bitatlas.app.talker import Talker
from bitatlas.app.tasks.jobs import status_dict, submit, submit_and_wait
from bitatlas.app.tasks.measuring import calibration_file
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.solving import read_allocation
from bitatlas.cache.paths import Home, atomic_write, disk_error
from bitatlas.cache.store import Store

if TYPE_CHECKING:
    from bitatlas.analysis.calibration import CalibrationSet

__all__ = ["check", "export", "generate", "index_of", "pack", "submit_pack"]


def submit_pack(
    model: str | Path,
    allocation: str | Path | Allocation,
    output: str | Path,
    *,
    quantizer: str = "rtn",
    calibration: str | Path | None = None,
    tokens: int = 16384,
    seq_len: int = 512,
    seed: int = 0,
) -> str:
    """Start (or join) the packing; returns the job's id.

    Args:
        model, allocation: what is packed, and how.
        output: the folder to write.
        quantizer: how codes are chosen; see `kernels.quantizers.QUANTIZERS`.
        calibration, tokens, seq_len, seed: text for quantisers that need one; the demo brings its own.

    Raises:
        UserError: allocation of another model, an output folder that holds something else, an unknown quantizer,
            no calibration text where one is needed.
    """
    from bitatlas.app.tasks.verifying import quantizer_params
    from bitatlas.app.work.pack import check_output, check_quantizer

    index = register(model)
    plan = allocation if isinstance(allocation, Allocation) else read_allocation(allocation)
    plan.check_model(index)
    check_quantizer(quantizer)
    out = Path(output).expanduser().resolve()
    check_output(out)
    params: dict[str, Any] = {
        "model": index.path, "digest": index.digest, "allocation": Store(Home.default()).put_allocation(plan),
        "output": str(out), "quantizer": quantizer,
    }  # fmt: skip
    text = quantizer_params(index, quantizer, calibration, tokens, seq_len)
    if "calibration" in text:
        params |= {"calibration": text["calibration"], "tokens": tokens, "seq_len": seq_len, "seed": seed}
    return submit("pack", params, f"pack {index.name} at {plan.bits_per_weight:.2f} bits")


def pack(
    model: str | Path,
    allocation: str | Path | Allocation,
    output: str | Path,
    *,
    quantizer: str = "rtn",
    calibration: str | Path | None = None,
    tokens: int = 16384,
    seq_len: int = 512,
    seed: int = 0,
    wait: bool = True,
    on_progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Write a packed checkpoint. With ``wait`` its result (folder, bytes written, bytes predicted)."""
    job = submit_pack(
        model, allocation, output, quantizer=quantizer, calibration=calibration, tokens=tokens, seq_len=seq_len,
        seed=seed,
    )  # fmt: skip
    status = submit_and_wait(job, wait, on_progress)
    return status.result if wait and status.result else status_dict(status)


def generate(
    directory: str | Path, prompt: str, *, max_new_tokens: int = 64, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """Continue ``prompt`` greedily with a packed checkpoint; K and V are packed too where its allocation says so.

    ``device`` and ``dtype`` are words of `app.devices`.

    Returns:
        prompt, text (the continuation with the prompt), tokens, kv_bytes (of K and V at the end, measured; None for a cache at the model's own precision).
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(
            "there is no such folder",
            found=str(folder),
            fix="make one with `bitatlas pack MODEL allocation.json -o DIR`",
        )
    check_new_tokens(max_new_tokens)
    check_place(device, dtype)
    talker = Talker.packed(folder, device, dtype)
    ids = talker.ids(prompt)
    out, kv_bytes = talker.go_on(ids, max_new_tokens)
    return {
        "prompt": prompt,
        "text": talker.tokenizer.decode(out[0], skip_special_tokens=True),
        "tokens": int(out.shape[1] - ids.shape[1]),
        "kv_bytes": kv_bytes,
    }


def index_of(allocation: Allocation, model: str | None) -> ModelIndex:
    """The model that an allocation is for, from the store by its digest, or as named."""
    if model is not None:
        index = register(model)
    else:
        store = Store(Home.default())
        known = {m["digest"] for m in store.models()}
        if allocation.model_digest not in known:
            raise UserError(
                f"the store does not know the model of this allocation ({allocation.model_name})",
                found=f"digest {allocation.model_digest[:12]}",
                fix="name it with --model FOLDER",
            )
        index = store.model(allocation.model_digest)
    allocation.check_model(index)
    return index


def check(
    allocation: str | Path | Allocation, target: str | None = None, *, model: str | None = None
) -> dict[str, Any]:
    """Would this engine load it: servable, loads but decodes wrong, or rejected; unit by unit, with the reasons.

    Without ``target`` all engines are asked: ``engines`` holds an answer of each.
    """
    from bitatlas.app.targets import TARGETS, get_target

    plan = allocation if isinstance(allocation, Allocation) else read_allocation(allocation)
    index = index_of(plan, model)
    if target is None:
        return {
            "engines": [{"target": name, **t.check(plan, index).to_dict()} for name, t in TARGETS.items()]
        }
    return {"target": target, **get_target(target).check(plan, index).to_dict()}


def export(
    allocation: str | Path | Allocation,
    target: str,
    output: str | Path,
    *,
    model: str | None = None,
    weights: bool = False,
    quantizer: str = "rtn",
    calibration: str | Path | None = None,
    tokens: int = 16384,
    seq_len: int = 512,
) -> dict[str, Any]:
    """Write the files of a target and say which command to run; with ``weights`` the finished checkpoint instead.

    ``calibration`` (with ``tokens``, ``seq_len``) is the text of a ``quantizer`` that reads one; without ``weights``
    it adds what the engine's own tools take of a text: llama.cpp's imatrix, GPTQModel's token sequences.

    Raises:
        UserError: the engine rejects the allocation (for weights: does not serve it), its container is not one that
            is written here, or an option that does not count for it; nothing is written then.
    """
    from bitatlas.app.targets import get_target
    from bitatlas.app.work.checkpoint import loadable
    from bitatlas.app.work.pack import check_quantizer

    check_quantizer(quantizer)
    plan = allocation if isinstance(allocation, Allocation) else read_allocation(allocation)
    index = index_of(plan, model)
    engine = get_target(target)
    verdict = engine.check(plan, index)
    if verdict.status == "rejected":
        raise UserError(
            f"{target} rejects this allocation", found="; ".join(verdict.reasons[:3]), fix=verdict.change
        )
    about = {"target": target, **verdict.to_dict()}
    folder = Path(output).expanduser()
    if weights:
        if verdict.status != "servable":
            raise UserError(f"{target} would not serve this", found=verdict.reasons[0], fix=verdict.change)
        engine.check_weights(plan, index, quantizer)
        text = _quantizer_text(index, quantizer, calibration, tokens, seq_len)
        source = loadable(index, Home.default())
        inputs = _calibration(source, text, tokens, seq_len) if text else None
        made = engine.write_weights(
            replace(plan, model_digest=source.digest), source, folder, quantizer=quantizer, calibration=inputs
        )
        command = engine.serve_command(str(folder.absolute()), plan, source)
        return {**about, "files": [str(f) for f in made], "command": command}
    if quantizer != "rtn":
        raise UserError("--quantizer counts only for weights that are written here", found=quantizer,
                        fix="add --weights, or leave it out")  # fmt: skip
    if calibration is not None and not engine.TAKES_TEXT:
        raise UserError(f"{target} makes nothing of a calibration text", found=str(calibration),
                        fix="leave --calibration out, or add --weights --quantizer mse")  # fmt: skip
    asked = calibration is not None or engine.NEEDS_TEXT  # the demo brings its own
    text = _file(calibration_file(index.path, calibration)) if asked else None
    files = engine.render(plan, index)
    with _all_or_none(folder) as staging:
        if text is not None:
            source = loadable(index, Home.default())
            engine.write_text_files(source, _calibration(source, text, tokens, seq_len), staging)
        for name, content in files.items():
            atomic_write(staging / name, content.encode(), named=True)
        names = [*files, *sorted(p.name for p in staging.iterdir() if p.name not in files)]
    return {
        **about,
        "files": [str(folder / name) for name in names],
        "command": engine.command(plan, index),
    }


def _calibration(source: ModelIndex, text: Path, tokens: int, seq_len: int) -> CalibrationSet:
    """The tokens that `pack` would take of the text."""
    from bitatlas.analysis.calibration import load_tokenizer, make_calibration

    return make_calibration(load_tokenizer(source.path), text, tokens, seq_len, vocab_size=source.vocab_size)


def _quantizer_text(
    index: ModelIndex, quantizer: str, calibration: str | Path | None, tokens: int, seq_len: int
) -> Path | None:
    """The file whose tokens the quantiser is given, None for one that reads none."""
    from bitatlas.app.tasks.verifying import quantizer_params

    text = quantizer_params(index, quantizer, calibration, tokens, seq_len).get("calibration")
    if text is None and calibration is not None:
        raise UserError(f"{quantizer} reads no calibration text", found=str(calibration),
                        fix="--quantizer mse, or leave --calibration out")  # fmt: skip
    return _file(Path(text)) if text else None


def _file(text: Path | None) -> Path | None:
    """The same, unless it stands for text sampled from the model, which only measuring makes."""
    if text is not None and not text.is_file():
        raise UserError("export takes its calibration text from a file", found=str(text),
                        fix="--calibration FILE (text or JSONL)")  # fmt: skip
    return text


@contextmanager
def _all_or_none(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, whose files move to ``folder`` when all are there; nothing is left otherwise."""
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is a file", found=str(folder), fix="name a folder")
    fresh, staging = not folder.exists(), folder / f".export-{os.getpid()}.tmp"
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.iterdir():
            os.replace(path, folder / path.name)
    except OSError as error:
        raise disk_error(error, folder, named=True) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if fresh and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
