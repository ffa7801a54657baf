"""The example scripts keep the function: permuted channels, and a dense model dealt to experts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model

EXAMPLES = Path(__file__).parents[2] / "examples"
IDS = torch.arange(1, 30)[None]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(folder):
    with torch.no_grad():
        return LoadedModel.open(index_model(folder)).logits(IDS)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_permuted_channels(tiny_checkpoint, tmp_path, family):
    source, out = tiny_checkpoint(family), tmp_path / "out"
    assert example("smollm2").write_permuted(source, out) < 1e-4
    assert list(tmp_path.iterdir()) == [out]
    torch.testing.assert_close(logits(out), logits(source), atol=1e-4, rtol=1e-4)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [n for n in before if before[n].dim() == 2 and not torch.equal(before[n], after[n])]
    assert len(moved) == sum(t.dim() == 2 for t in before.values())
    for name in before:
        # The same numbers in another order: not one bit of a weight changes.
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values)


def test_a_changed_function_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    module = example("smollm2")
    right = module.permute_llama

    def wrong(state, config):
        out = right(state, config)
        out["model.layers.0.mlp.up_proj.weight"] = (
            out["model.layers.0.mlp.up_proj.weight"].roll(1, 0).contiguous()
        )
        return out

    monkeypatch.setattr(module, "permute_llama", wrong)
    with pytest.raises(SystemExit, match="another function"):
        module.write_permuted(tiny_checkpoint("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_dense_to_experts(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    module = example("smollm2_moe")
    source, out = tiny_checkpoint("llama"), tmp_path / "moe"
    monkeypatch.setattr(sys, "argv", ["smollm2_moe.py", str(source), str(out)])
    module.main()
    assert list(tmp_path.iterdir()) == [out]
    torch.testing.assert_close(logits(out), logits(source), atol=1e-3, rtol=1e-3)
    index = index_model(out)
    assert (index.n_experts, index.top_k, index.model_type) == (8, 8, "mixtral")
    assert sum(u.expert >= 0 for u in index.units) == 2 * 8 * 3
    norms = [
        load_file(out / "model.safetensors")[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"].norm()
        for e in range(8)
    ]
    assert norms[0] > norms[7]
    module.main()
    assert "complete already" in capsys.readouterr().out


def test_only_what_can_be_dealt(tiny_checkpoint, tmp_path, monkeypatch):
    module = example("smollm2_moe")
    monkeypatch.setattr(sys, "argv", ["smollm2_moe.py", str(tiny_checkpoint("gpt2")), str(tmp_path / "moe")])
    with pytest.raises(SystemExit, match="not a bias-free Llama"):
        module.main()
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text())
    with pytest.raises(SystemExit, match="evenly"):
        module.mixtral_config(config | {"intermediate_size": 41})
