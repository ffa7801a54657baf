"""A dense Llama checkpoint as a Mixtral of 8 experts a layer that computes the same function.

The hidden neurons of each MLP are dealt to 8 experts (rows of gate and up, columns of down), the router is zero
and all 8 experts are always on, so each has weight 1/8; the experts' down projections are scaled by 8, which is
exact in binary. Neurons are dealt in order of |column of down| * rms(activation) on a short text, so the experts
differ strongly in what they contribute. There is no routing signal: use it for damage and bits per expert.

    python examples/smollm2_moe.py IN OUT
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitatlas.analysis.checkpoint import CheckpointFiles
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.errors import UserError

EXPERTS = 8
TOLERANCE = 1e-3
TEXT = (
    "The sea was calm that morning, and the fishermen, who had waited for days, pushed their boats out. In 1905 "
    "Albert Einstein published four papers. def area(r): return 3.14159 * r ** 2. The capital of France is Paris, "
    "the river is the Seine. Water boils at 100 degrees; iron melts at 1538. She asked: where are you going?"
)


def neuron_scores(folder: Path) -> tuple[dict[int, Tensor], Tensor]:
    """layer -> (ffn,) |column of down| * rms of its input on `TEXT`; and the logits (1, T, V)."""
    loaded = LoadedModel.open(index_model(folder))
    downs = {u.key: u.layer for u in loaded.index.units if u.role == "down"}
    scores: dict[int, Tensor] = {}

    def seen(key: str, x: Tensor, token_index: Tensor, weight: Tensor | None) -> None:
        column = loaded.handle(key).get().norm(dim=0)  # (ffn,)
        scores[downs[key]] = column * x.square().mean(0).sqrt()

    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad(), loaded.capture(seen, downs):
        return scores, loaded.logits(ids)


def logits(folder: Path) -> Tensor:
    """float32 logits (1, T, V) of `TEXT`."""
    loaded = LoadedModel.open(index_model(folder))
    with torch.no_grad():
        return loaded.logits(loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"])


def to_mixtral(
    state: dict[str, Tensor], scores: dict[int, Tensor], experts: int = EXPERTS
) -> dict[str, Tensor]:
    """Mixtral tensors, experts stored one by one, from the tensors of a bias-free Llama."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, mlp, leaf = name.partition("mlp.")
        if not mlp:
            out[name] = tensor
            continue
        layer = int(prefix.split(".")[2])
        # (experts, ffn / experts): the strongest neurons in expert 0, the weakest in the last.
        dealt = scores[layer].argsort(descending=True).reshape(experts, -1)
        hidden = tensor.shape[0] if leaf == "down_proj.weight" else tensor.shape[1]
        out[f"{prefix}block_sparse_moe.gate.weight"] = torch.zeros(experts, hidden, dtype=tensor.dtype)
        for e, rows in enumerate(dealt):
            stem = f"{prefix}block_sparse_moe.experts.{e}."
            if leaf == "down_proj.weight":
                out[f"{stem}w2.weight"] = (tensor[:, rows] * experts).contiguous()
            else:
                out[f"{stem}{'w1' if leaf == 'gate_proj.weight' else 'w3'}.weight"] = tensor[
                    rows
                ].contiguous()
    return out


def mixtral_config(config: dict[str, object], experts: int = EXPERTS) -> dict[str, object]:
    """The config of the MoE."""
    ffn = config["intermediate_size"]
    if not isinstance(ffn, int) or ffn % experts:
        raise SystemExit(f"{ffn} neurons cannot be dealt to {experts} experts evenly")
    return config | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts,
        "num_experts_per_tok": experts, "intermediate_size": ffn // experts, "sliding_window": None,
        "router_aux_loss_coef": 0.0, "output_router_logits": False,
    }  # fmt: skip


def main() -> None:
    """Convert and check."""
    parser = argparse.ArgumentParser(
        description="a dense Llama checkpoint as an equal Mixtral of 8 experts a layer"
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    source, out = args.source.absolute(), args.out.absolute()
    if out.exists():
        CheckpointFiles.open(out)
        print(f"{out} is complete already")
        return
    files = CheckpointFiles.open(source)
    if files.config.get("model_type") != "llama" or any(name.endswith(".bias") for name in files.tensors):
        raise SystemExit(f"{source} is not a bias-free Llama checkpoint")
    scores, before = neuron_scores(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        for file in source.iterdir():
            if not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy(file, work / file.name)
        (work / "config.json").write_text(json.dumps(mixtral_config(files.config), indent=2) + "\n")
        state: dict[str, Tensor] = {}
        for shard in files.shards:
            state |= load_file(files.folder / shard)
        save_file(to_mixtral(state, scores), work / "model.safetensors", metadata={"format": "pt"})
        difference = float((before - logits(work)).abs().max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"the MoE is another function: logits differ by {difference:.3g}")
        work.chmod(0o755)
        (work / "model.safetensors").chmod(0o644)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {out}; largest difference of the logits {difference:.1e}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"error: {e}") from None
