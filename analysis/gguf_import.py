"""GGUF to a normal bf16 checkpoint folder, once, through transformers.

The conversion runs in a child process (its libraries parse untrusted bytes and take several times the model's
size in memory) in a folder where only the GGUF is visible, and only after our own header check. What was already
quantised in the file stays so: the imported weights carry that error, which no metric can see.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from bitatlas.analysis.checkpoint import CheckpointFiles
from bitatlas.analysis.gguf_header import read_gguf_header
from bitatlas.analysis.gguf_names import hf_config, index_gguf
from bitatlas.kernels.errors import UserError

__all__ = ["convert", "import_gguf"]


def import_gguf(path: str | Path, out_dir: str | Path) -> Path:
    """Convert a GGUF file into ``out_dir`` (safetensors, config, tokenizer) and return it.

    An ``out_dir`` that already is a complete checkpoint is returned as it is. Nothing is left behind on failure.

    Raises:
        UserError: a malformed file, an architecture that cannot be imported, no room, a tensor without a place.
    """
    path, out = Path(path).expanduser().absolute(), Path(out_dir).expanduser().absolute()
    index = index_gguf(path)
    if out.exists():
        CheckpointFiles.open(out)
        return out
    need = 2 * sum(u.params for u in index.units) + index.kept_bytes
    work = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        if (free := shutil.disk_usage(out.parent).free) < need + (64 << 20):
            raise UserError("there is not enough room for the imported checkpoint",
                            found=f"{need} bytes needed, {free} free at {out.parent}", fix="free some space")  # fmt: skip
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", suffix=".tmp", dir=out.parent))
        _run_child(path, work)
        CheckpointFiles.open(work / "out")
        try:
            os.replace(work / "out", out)
        except OSError:
            CheckpointFiles.open(
                out
            )  # Another process imported the same file meanwhile; its result is as good.
    except OSError as e:
        raise UserError(
            f"{path.name} could not be imported", found=str(e), fix="check the target folder"
        ) from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return out


def _run_child(path: Path, work: Path) -> None:
    source = work / "source"
    source.mkdir()
    (source / "model.gguf").symlink_to(path)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "bitatlas.analysis.gguf_import", str(source), str(work / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{path.name} could not be imported", found=last[:400],
                        fix="take the Hugging Face checkpoint that the file was made from")  # fmt: skip


def _sweep(out: Path) -> None:
    """Remove what killed imports of the same target left behind; the folder's name carries their process id."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        owner = left.name.removeprefix(f".{out.name}.").split(".")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def convert(source: Path, out: Path) -> None:
    """What the child process does: load ``source/model.gguf`` through transformers, save it as bf16 into ``out``.

    Raises:
        SystemExit: the file has no value for some parameter.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    header = read_gguf_header(source / "model.gguf")
    options: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    config = AutoConfig.from_pretrained(source, **options)
    for key, value in hf_config(header).items():
        # transformers' key table is incomplete (head_dim, expert widths); the header and the shapes know.
        setattr(config, key, value)
    model, report = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=torch.bfloat16, output_loading_info=True,
        # Without this the model counts as quantised and refuses to be saved.
        quantization_config=GgufConfig(dequantize=True), **options,
    )  # fmt: skip
    lost = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
    if lost:
        raise SystemExit(f"no value in the GGUF for {len(lost)} parameters, such as {lost[0]}")
    # The importer's paths would otherwise stand in the saved config.
    model.config._name_or_path = ""
    # The GGUF loader fills fused experts and records that nothing was converted; the usual names are one per expert.
    model._weight_conversions = None
    model.save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        weights.chmod(0o644)  # the library writes them for the owner alone
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    kept = {
        k: v for k, v in json.loads(settings.read_text()).items() if k not in ("name_or_path", "gguf_file")
    }
    settings.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
