"""Every unit of every family is found in memory, equals the file, and changes the function when it is changed."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.weights import WeightReader, oriented

FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2", "opt", "mixtral",
            "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")  # fmt: skip
IDS = torch.randint(1, 250, (2, 11), generator=torch.Generator().manual_seed(7))


def reference_logits(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_list_is_the_factories(checkpoints):
    assert set(FAMILIES) == set(checkpoints.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_in_memory_equal_the_file(tiny_checkpoint, family):
    index = index_model(tiny_checkpoint(family))
    loaded = LoadedModel.open(index)
    with WeightReader(index) as reader:
        for unit in index.units:
            weight = reader.get(unit)
            assert weight.shape == (unit.rows, unit.cols)
            assert torch.equal(loaded.handle(unit.key).get(), weight), unit.key
    with torch.no_grad():
        ours = loaded.logits(IDS)
    assert torch.equal(ours, reference_logits(tiny_checkpoint(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_set_does_what_editing_the_file_does(tiny_checkpoint, tmp_path, family):
    source = tiny_checkpoint(family)
    index = index_model(source)
    units = [u for u in index.units if u.expert in (-1, 1) and u.layer in (-1, 1)]
    folder = tmp_path / "edited"
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    weights = {u.key: torch.randn(u.rows, u.cols, generator=generator) * 0.3 for u in units}
    for u in units:
        stored = state[u.tensor]
        oriented(stored[u.expert] if stored.dim() == 3 else stored, u).copy_(weights[u.key])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    want = reference_logits(folder)
    loaded = LoadedModel.open(index)
    with torch.no_grad():
        before = loaded.logits(IDS)
        with loaded.swapped(weights):
            got = loaded.logits(IDS)
        after = loaded.logits(IDS)
    assert torch.equal(before, after)
    assert not torch.allclose(before, want, atol=1e-2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_sees_the_matmuls(tiny_checkpoint, family):
    """Y = X W^T rebuilt from what was captured changes as the model does: dY/dW is checked through the gradient."""
    index = index_model(tiny_checkpoint(family))
    loaded = LoadedModel.open(index)
    seen: dict[str, int] = {}
    gram: dict[str, torch.Tensor] = {}

    def callback(key, x, token, weight):
        seen[key] = seen.get(key, 0) + len(x)
        assert x.dim() == 2
        assert len(token) == len(x)
        assert weight is None or len(weight) == len(x)
        assert int(token.max()) < IDS.numel()
        gram[key] = x.double().T @ x.double()

    with loaded.capture(callback), torch.no_grad():
        loaded.logits(IDS)
    for unit in index.units:
        if unit.role == "embed" and any(u.role == "head" for u in index.units):
            assert unit.key not in seen
        elif unit.expert < 0:
            assert seen[unit.key] == IDS.numel(), unit.key
            assert gram[unit.key].shape == (unit.cols, unit.cols)
    if index.n_experts:
        for layer in {u.layer for u in index.units if u.expert >= 0}:
            for role in ("gate", "up", "down"):
                keys = [u.key for u in index.units if u.layer == layer and u.role == role and u.expert >= 0]
                assert sum(seen.get(k, 0) for k in keys) == IDS.numel() * index.top_k
    # The row space of a weight's gradient lies in the span of its inputs, here checked by projection.
    with loaded.requires_grad(index.unit_keys()):
        loaded.logits(IDS).square().mean().backward()
        for key, g in gram.items():
            grad = loaded.handle(key).grad()
            assert grad is not None
            if key in seen and not (index.units[0].key == key and "lm_head" not in seen):
                basis = torch.linalg.pinv(g) @ g
                torch.testing.assert_close(grad.double() @ basis, grad.double(), atol=1e-6, rtol=1e-3)
    assert all(not p.requires_grad and p.grad is None for p in loaded.model.parameters())


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen3_moe"])
def test_swapping_whole_parameters_copies_nothing_and_errors_restore(tiny_checkpoint, family):
    loaded = LoadedModel.open(index_model(tiny_checkpoint(family)))
    keys = loaded.index.unit_keys()
    before = {k: (loaded.handle(k).get().data_ptr(), loaded.handle(k).get().clone()) for k in keys}
    weights = {k: torch.zeros(loaded.handle(k).get().shape) for k in keys}
    with loaded.swapped(weights):
        whole = [k for k in keys if loaded.handle(k).param.data.data_ptr() == weights[k].data_ptr()]
        assert all(float(loaded.handle(k).get().abs().max()) == 0 for k in keys)
    assert bool(whole) == (family != "gpt2" or any(not loaded.handle(k).transposed for k in keys))
    weights[keys[-1]] = torch.zeros(2, 2)
    with pytest.raises(ValueError), loaded.swapped(weights):
        pass
    for k in keys:
        pointer, weight = before[k]
        assert loaded.handle(k).get().data_ptr() == pointer
        assert torch.equal(loaded.handle(k).get(), weight)
