"""The reader: exact values in the unit's orientation, fp8 resolved, bad values named, changes seen."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.scaled import dequantize_mxfp4
from bitatlas.analysis.weights import WeightReader
from bitatlas.kernels.errors import UserError


def checkpoint(folder, state, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 3} | config))
    save_file(state, folder / "model.safetensors")
    return index_model(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_of_every_float_type(tmp_path, dtype):
    weight = torch.randn(7, 5).to(dtype)
    index = checkpoint(tmp_path / "m", {"a.weight": weight, "n": torch.arange(3)})
    with WeightReader(index) as reader:
        got = reader.get("a")
        assert got.dtype == torch.float32
        assert torch.equal(got, weight.float())
        got.zero_()
        assert torch.equal(reader.get(index.units[0]), weight.float())
        assert torch.equal(reader.kept("n"), torch.arange(3))


def test_gpt_oss_layout_by_hand(tmp_path):
    experts, hidden, ffn = 2, 3, 5
    gate_up, down = torch.randn(experts, hidden, 2 * ffn), torch.randn(experts, ffn, hidden)
    state = {"model.layers.0.mlp.experts.gate_up_proj": gate_up, "model.layers.0.mlp.experts.down_proj": down}
    index = checkpoint(tmp_path / "m", state, model_type="gpt_oss")
    with WeightReader(index) as reader:
        for e in range(experts):
            stem = "model.layers.0.mlp.experts."
            want = torch.tensor([[gate_up[e, h, 2 * f] for h in range(hidden)] for f in range(ffn)])
            assert torch.equal(reader.get(f"{stem}gate_up_proj[{e}].gate"), want)
            want = torch.tensor([[gate_up[e, h, 2 * f + 1] for h in range(hidden)] for f in range(ffn)])
            assert torch.equal(reader.get(f"{stem}gate_up_proj[{e}].up"), want)
            assert torch.equal(reader.get(f"{stem}down_proj[{e}]"), down[e].T)


def test_concatenated_stack_by_hand(tmp_path):
    gate_up = torch.randn(2, 10, 3)
    index = checkpoint(
        tmp_path / "m", {"layers.0.mlp.experts.gate_up_proj": gate_up}, model_type="qwen3_5_moe_text"
    )
    with WeightReader(index) as reader:
        assert torch.equal(reader.get("layers.0.mlp.experts.gate_up_proj[1].gate"), gate_up[1, :5])
        assert torch.equal(reader.get("layers.0.mlp.experts.gate_up_proj[1].up"), gate_up[1, 5:])


def naive_blocks(weight, scale, block):
    out = weight.float()
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] *= scale[r // block[0], c // block[1]]
    return out


@pytest.mark.parametrize("block", [(4, 4), (128, 128), (2, 5)])
def test_fp8_blocks(tmp_path, block):
    weight = torch.randn(10, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-10 // block[0]), -(-7 // block[1])) + 0.1
    quant = {"quant_method": "fp8", "weight_block_size": list(block)}
    state = {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": torch.ones(4, 3)}
    index = checkpoint(tmp_path / "m", state, quantization_config=quant)
    assert [u.key for u in index.units] == ["a", "b"]
    assert index.kept == ()
    assert any("fp8" in n for n in index.notes)
    with WeightReader(index) as reader:
        torch.testing.assert_close(reader.get("a"), naive_blocks(weight, scale, block))


@pytest.mark.parametrize("shape", [(), (1,), (10,), (10, 1)])
def test_fp8_scale_per_tensor_and_per_row(tmp_path, shape):
    weight, scale = torch.randn(10, 7).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    index = checkpoint(tmp_path / "m", {"a.weight": weight, "a.weight_scale": scale},
                       quantization_config={"quant_method": "fp8"})  # fmt: skip
    with WeightReader(index) as reader:
        want = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1, 1))
        torch.testing.assert_close(reader.get("a"), want)


def test_fp8_scales_that_do_not_fit(tmp_path):
    state = {"a.weight": torch.ones(10, 7).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(5, 2)}
    index = checkpoint(tmp_path / "m", state, quantization_config={"quant_method": "fp8"})
    with WeightReader(index) as reader, pytest.raises(UserError, match="scales"):
        reader.get("a")


def test_fp8_checkpoint_runs_as_its_dequantised_twin(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("deepseek_v3")
    shutil.copytree(source, tmp_path / "fp8")
    shutil.copytree(source, tmp_path / "plain")
    state = load_file(source / "model.safetensors")
    fp8, plain = dict(state), dict(state)
    block = [16, 8]
    for u in index_model(source).units:
        if u.role in ("embed", "head"):
            continue
        codes = (state[u.tensor] * 8).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-u.rows // block[0]), -(-u.cols // block[1])) * 0.1 + 0.08
        fp8[u.tensor], fp8[u.tensor + "_scale_inv"] = codes, scale
        plain[u.tensor] = naive_blocks(codes, scale, block)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    save_file(fp8, tmp_path / "fp8" / "model.safetensors")
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    ids = torch.arange(1, 12)[None]
    a, b = (LoadedModel.open(index_model(tmp_path / name)).logits(ids) for name in ("fp8", "plain"))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_are_named_and_counted(tiny_checkpoint, tmp_path, value):
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4:7] = value
    save_file(state, folder / "model.safetensors")
    index = index_model(folder)
    with WeightReader(index) as reader:
        assert torch.isfinite(reader.get("model.layers.0.mlp.up_proj")).all()
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*NaN or Inf.*3 of 960"):
            reader.get("model.layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*NaN or Inf"):
        LoadedModel.open(index)


@pytest.mark.parametrize("change", ["truncate", "touch"])
def test_file_changed_while_reading(tmp_path, change):
    index = checkpoint(tmp_path / "m", {"a.weight": torch.ones(300, 300), "b.weight": torch.ones(300, 300)})
    path = tmp_path / "m" / "model.safetensors"
    with WeightReader(index) as reader:
        reader.get("a")
        if change == "truncate":
            os.truncate(path, path.stat().st_size // 2)
        else:
            os.utime(path, ns=(1, 1))
        with pytest.raises(UserError, match="changed while it was read"):
            reader.get("b")


def test_stale_index(tmp_path):
    index = checkpoint(tmp_path / "m", {"a.weight": torch.ones(4, 3)})
    checkpoint(tmp_path / "m", {"a.weight": torch.ones(5, 3)})
    with pytest.raises(UserError, match="changed since it was indexed"):
        WeightReader(index)
    checkpoint(tmp_path / "m", {"b.weight": torch.ones(4, 3)})
    with pytest.raises(UserError, match="changed since it was indexed"):
        WeightReader(index)


def test_unknown_names(tmp_path):
    index = checkpoint(tmp_path / "m", {"a.weight": torch.ones(4, 3)})
    with WeightReader(index) as reader:
        with pytest.raises(UserError, match="no unit 'zz'"):
            reader.get("zz")
        with pytest.raises(UserError, match="no tensor 'zz'"):
            reader.kept("zz")
    with pytest.raises(UserError, match="import"):
        WeightReader(replace(index, source="gguf"))


def test_shards_are_read_like_one_file(tiny_checkpoint):
    one, many = (
        index_model(tiny_checkpoint("qwen3_moe")),
        index_model(tiny_checkpoint("qwen3_moe", shard="40KB")),
    )
    assert one.units == many.units
    with WeightReader(one) as a, WeightReader(many) as b:
        assert len(b.files.shards) > 2
        for u in one.units:
            assert torch.equal(a.get(u), b.get(u))


def test_memory_stays_at_one_unit(tmp_path):
    import tracemalloc

    index = checkpoint(tmp_path / "m", {f"layers.{i}.w.weight": torch.ones(256, 1024) for i in range(20)})
    with WeightReader(index) as reader:
        tracemalloc.start()
        for u in index.units:
            reader.get(u)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Only the read buffers are Python's; torch allocates its copies elsewhere.
    assert peak < 3 * 256 * 1024 * 4


def test_mxfp4_against_the_library():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 130, (3, 5, 2), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    ours = dequantize_mxfp4(blocks, scales, "x")
    assert ours.shape == (3, 5, 64)
    # The library transposes in the same step.
    assert torch.equal(ours, theirs.transpose(1, 2))
    with pytest.raises(UserError, match="do not fit"):
        dequantize_mxfp4(blocks, scales[:, :4], "x")


def test_mxfp4_checkpoint_runs_as_its_dequantised_twin(tiny_checkpoint, tmp_path):
    """gpt-oss as it is published: experts in MXFP4 blocks along the input, gate and up alternating."""
    source = tiny_checkpoint("gpt_oss", hidden_size=64, intermediate_size=32)
    state = load_file(source / "model.safetensors")
    packed, plain = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = plain[name] = tensor
            continue
        experts, inner, outer = tensor.shape
        blocks = torch.randint(
            0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(120, 124, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        plain[name] = dequantize_mxfp4(blocks, scales, name).transpose(1, 2).contiguous()
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, extra in (
        ("packed", packed, {"quantization_config": {"quant_method": "mxfp4"}}),
        ("plain", plain, {}),
    ):
        shutil.copytree(source, tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, tmp_path / folder / "model.safetensors")
    a, b = index_model(tmp_path / "packed"), index_model(tmp_path / "plain")
    assert [(u.key, u.role, u.rows, u.cols, u.expert) for u in a.units] == [
        (u.key, u.role, u.rows, u.cols, u.expert) for u in b.units
    ]
    assert {k.name for k in a.kept} == {k.name for k in b.kept}
    with WeightReader(a) as ours, WeightReader(b) as theirs:
        for u, v in zip(a.units, b.units):
            assert torch.equal(ours.get(u), theirs.get(v)), u.key
    ids = torch.arange(1, 12)[None]
    loaded = LoadedModel.open(a)
    with WeightReader(a) as reader:
        for u in a.units:
            assert torch.equal(loaded.handle(u.key).get(), reader.get(u)), u.key
    torch.testing.assert_close(loaded.logits(ids), LoadedModel.open(b).logits(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "qwen3_moe"])
def test_windows_are_cut_out_of_the_unit(tiny_checkpoint, family):
    index = index_model(tiny_checkpoint(family))
    seen = set()
    with WeightReader(index) as reader:
        for u in index.units:
            if (u.role, u.part) not in seen:
                whole = reader.get(u)
                for rows, cols in (
                    ((0, u.rows), None),
                    ((3, 11), (0, u.cols)),
                    ((1, u.rows), (2, u.cols - 1)),
                ):
                    c, d = cols or (0, u.cols)
                    assert torch.equal(reader.window(u, rows, cols), whole[rows[0] : rows[1], c:d]), u.key
            seen.add((u.role, u.part))
    assert len(seen) > 2


@pytest.mark.parametrize("shape", [(1, 1), (10, 1), (5, 2), (10,), ()])
def test_windows_of_fp8_find_their_scales(tmp_path, shape):
    weight, scale = torch.randn(10, 7).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    quant = {"quant_method": "fp8", "weight_block_size": [2, 5]}
    state = {"a.weight": weight, "a.weight_scale_inv": scale}
    index = checkpoint(tmp_path / "m", state, quantization_config=quant)
    with WeightReader(index) as reader:
        whole = reader.get("a")
        for a, b, c, d in ((0, 10, 0, 7), (3, 8, 0, 7), (1, 10, 4, 6), (9, 10, 5, 7)):
            torch.testing.assert_close(reader.window(index.units[0], (a, b), (c, d)), whole[a:b, c:d])


def test_windows_of_mxfp4_and_bad_values(tmp_path):
    blocks = torch.randint(0, 256, (2, 6, 1, 16), dtype=torch.uint8)
    name, scales = "model.layers.0.mlp.experts.down_proj", torch.full((2, 6, 1), 120, dtype=torch.uint8)
    bad = torch.zeros(9, 4)
    bad[5, 2] = float("nan")
    state = {name + "_blocks": blocks, name + "_scales": scales, "a.weight": bad}
    index = checkpoint(
        tmp_path / "m", state, model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"}
    )
    units = {u.key: u for u in index.units}
    with WeightReader(index) as reader:
        expert = units[name + "[1]"]
        assert torch.equal(reader.window(expert, (2, 5), (1, 6)), reader.get(expert)[2:5, 1:6])
        assert reader.window(units["a"], (0, 5)).shape == (5, 4)
        with pytest.raises(UserError, match="NaN or Inf"):
            reader.window(units["a"], (4, 9))
