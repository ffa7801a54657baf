from __future__ import annotations

import json
from pathlib import Path

import packed_models as models
import pytest
import torch
from torch import nn

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packed import load
from bitatlas.kernels.packed.matrix import PackedMatrix
from bitatlas.kernels.packed.modules import PackedExperts


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_packed_model_computes_what_the_quantised_dense_one_does(family: str, tmp_path: Path) -> None:
    models.build(family, tmp_path / "model")
    packing = models.Packing(tmp_path / "model", family)
    assert len(packing.manifest.shards) > 1
    packed = load(packing.write(tmp_path / "packed"))
    want = packing.reference(tmp_path / "dense")
    ids = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        difference = (packed(ids).logits - want(ids).logits).abs().max().item()
    assert difference <= 1e-4
    assert want(ids).logits.abs().max() > 0.1
    left = [n for n, m in packed.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert [n for n in left if not n.endswith(("shared_expert_gate", "wpe", "embed_positions"))] == []
    assert any(isinstance(m, PackedExperts) for m in packed.modules()) == hasattr(
        want.config, "num_experts_per_tok"
    )
    held = sum(m.nbytes for m in packed.modules() if isinstance(m, PackedMatrix))
    assert held == packing.manifest.payload_bytes
    out = [m.generate(ids[:1, :5], max_new_tokens=6, do_sample=False) for m in (packed, want)]
    assert torch.equal(out[0], out[1])


def test_bfloat16_computes_in_bfloat16(tmp_path: Path) -> None:
    models.build("qwen3_moe", tmp_path / "model")
    packing = models.Packing(tmp_path / "model", "qwen3_moe", ("int8-g32",))
    folder = packing.write(tmp_path / "packed")
    ids = torch.tensor([[5, 6, 7, 8]])
    low, full = load(folder, dtype=torch.bfloat16), load(folder)
    assert low(ids).logits.dtype == torch.bfloat16
    torch.testing.assert_close(low(ids).logits.float(), full(ids).logits, atol=0.15, rtol=0.1)


def test_a_module_of_unknown_kind_is_dequantised_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitatlas.kernels.packed import replace

    monkeypatch.setattr(replace, "_is_experts", lambda module: False)
    monkeypatch.setattr(replace, "_packable", lambda module: False)
    for family in ("gpt_oss", "qwen3_moe", "gpt2"):
        root = tmp_path / family
        models.build(family, root / "model")
        packing = models.Packing(root / "model", family)
        packed, want = load(packing.write(root / "packed")), packing.reference(root / "dense")
        assert not any(isinstance(m, PackedMatrix) for m in packed.modules())
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(packed(ids).logits, want(ids).logits, atol=1e-4, rtol=0)


def test_nothing_in_the_folder_is_run(tmp_path: Path) -> None:
    models.build("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "quantization_config": {"quant_method": "gptq"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (tmp_path / "model" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    folder = models.Packing(tmp_path / "model", "llama").write(tmp_path / "packed")
    written = json.loads((folder / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & set(written)
    (folder / "config.json").write_text(json.dumps(config | {"_attn_implementation": "someone/kernels"}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"model_type": "nobody"}, "not known"),
        (lambda c: c | {"num_hidden_layers": 3}, "lacks tensors"),
        (lambda c: c | {"num_hidden_layers": 1}, "no place"),
        (lambda c: c | {"intermediate_size": 81}, "does not fit"),
        (lambda c: c | {"vocab_size": 98}, "fit"),
        (lambda c: [], "model_type"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message: str, tmp_path: Path) -> None:
    models.build("llama", tmp_path / "model")
    folder = models.Packing(tmp_path / "model", "llama").write(tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(UserError, match=message):
        load(folder)
