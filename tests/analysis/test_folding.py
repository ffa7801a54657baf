"""Scale folding: the function stays, whatever the architecture, and AWQ's search finds what a naive one finds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitatlas.analysis.folding import (
    Folding,
    confirmed,
    exact_scale,
    find_folds,
    folded,
    read_scales,
    widened,
    write_scales,
)
from bitatlas.analysis.input_stats import InputSource
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.quantising import UnitQuantizer
from bitatlas.analysis.weights import WeightReader
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize

# family -> kinds that hold; Gemma's norms multiply by 1 + weight, OPT's ReLU lets a scale through, gpt-oss clamps.
KINDS = {
    "llama": {"attention", "mlp", "value", "up"},
    "qwen2": {"attention", "mlp", "value", "up"},
    "gemma3": {"attention", "mlp", "value", "up"},
    "gpt2": {"attention", "mlp"},
    "opt": {"attention", "mlp", "value", "fc1"},
    "qwen2_moe": {"attention", "mlp", "value", "up", "shared_up"},
    "deepseek_v3": {"attention", "mlp", "up", "shared_up"},
    "gpt_oss": {"attention", "value"},
}


@pytest.mark.parametrize("family", KINDS)
def test_folding_any_scale_leaves_the_logits(family, tiny_checkpoint):
    index = index_model(tiny_checkpoint(family, dtype="bfloat16"))
    loaded = LoadedModel.open(index)
    ids = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    want = loaded.logits(ids)
    folds = confirmed(loaded, find_folds(index))
    assert {f.kind for f in folds} == KINDS[family]
    assert torch.equal(loaded.logits(ids), want)  # trying them left nothing behind
    generator = torch.Generator().manual_seed(2)
    with WeightReader(index) as reader:
        scales = [
            (f, exact_scale(f, 0.2 + 4 * torch.rand(f.size, generator=generator), reader.kept(f.gamma) if f.gamma else None))
            for f in folds
        ]  # fmt: skip
        folding = Folding(scales)
        for fold, _ in scales:
            if fold.gamma:
                assert folding.kept(fold.gamma, reader.kept(fold.gamma)).dtype == torch.bfloat16
            for name in (*fold.kept, *fold.kept_in):
                assert folding.kept(name, reader.kept(name)).dtype == torch.float32
                assert name in widened(find_folds(index))
    with folded(loaded, folding):
        got = loaded.logits(ids)
    assert (got - want).abs().max() <= 1e-4
    assert max(float(s.max() / s.min()) for _, s in scales) > 5


def test_a_fold_that_changes_the_function_is_dropped(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("llama")))
    folds = find_folds(loaded.index)
    # Forget that the up projection sees the norm's output too.
    wrong = [replace(f, consumers=f.consumers[:1]) if f.kind == "mlp" else f for f in folds]
    assert Counter(f.kind for f in confirmed(loaded, wrong)) == {"attention": 2, "value": 2, "up": 2}


def test_scales_survive_the_disk(tiny_checkpoint, tmp_path):
    index = index_model(tiny_checkpoint("gemma3"))
    folds = [replace(f, offset=1.0 if f.gamma else 0.0) for f in find_folds(index)]
    before = Folding((f, torch.rand(f.size) + 0.5) for f in folds[1:])
    write_scales(tmp_path / "s.safetensors", before)
    after = read_scales(tmp_path / "s.safetensors", find_folds(index))
    assert {n: f for n, (f, _) in after.scales.items()} == {n: f for n, (f, _) in before.scales.items()}
    assert all(torch.equal(after.scales[n][1], s) for n, (_, s) in before.scales.items())
    weight = torch.randn(index.units[1].rows, index.units[1].cols)
    key = index.units[1].key
    assert torch.allclose(after.undo(key, after.apply(key, weight)), weight, atol=1e-6)


def test_awq_takes_the_exponent_with_the_least_output_error(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("llama")))
    tokens = np.random.default_rng(0).integers(1, 250, (16, 12))
    formats = dict.fromkeys(loaded.index.unit_keys(), "int3-channel")
    made = UnitQuantizer.over("awq", loaded, tokens, formats)
    fmt = parse_format("int3-channel")
    fold, found = made.folding.scales["mlp of layer 1"]
    source = InputSource(loaded, tokens, loaded.index.units)

    def error(scale: torch.Tensor) -> float:
        total = 0.0
        for key in fold.consumers:
            w = loaded.handle(key).get().double()
            h = source.get(key).hessian.double()
            d = quantize_dequantize((w * scale).float(), fmt).double() / scale - w
            total += float(torch.trace(d @ h @ d.T))
        return total

    rms = source.get(fold.consumers[0]).mean_square.double().sqrt()
    tried = [rms ** (i / 20) / float((rms.max() * rms.min()) ** (i / 40)) for i in range(20)]
    assert error(found.double()) <= min(error(s) for s in tried) * (1 + 1e-4)
    assert error(found.double()) < error(torch.ones_like(rms))


def test_units_stored_as_they_are_stay_exact(tiny_checkpoint):
    index = index_model(tiny_checkpoint("llama", dtype="bfloat16"))
    loaded = LoadedModel.open(index)
    tokens = np.random.default_rng(0).integers(1, 250, (8, 12))
    formats = {u.key: "bf16" if u.role in ("k", "up") else "int3-g32" for u in index.units}
    made = UnitQuantizer.over("awq", loaded, tokens, formats)
    for u in index.units:
        if formats[u.key] == "bf16":
            weight = loaded.handle(u.key).get()
            assert torch.equal(made.effective(u.key, weight, parse_format("bf16")), weight)
    assert made.folding.scales


def test_it_says_what_it_needs(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("llama")))
    with pytest.raises(UserError, match="calibration text"):
        UnitQuantizer.over("awq", loaded, None, {})
