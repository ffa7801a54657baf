"""What is written for an engine under gptq, awq and mse is what `pack` stores under the same quantiser and text."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, Allocation, ModelIndex, UserError
from bitatlas.app.targets import SERVABLE, TARGETS
from bitatlas.app.targets.ggml import gguf_name
from bitatlas.app.targets.mlx import mlx_name
from bitatlas.app.work.gguf_checkpoint import _permute
from bitatlas.app.work.pack import pack_model
from bitatlas.kernels.packed.matrix import PackedMatrix, packed_tensors
from bitatlas.kernels.packing import unpack_codes
from bitatlas.kernels.reference import Quantized, dequantize

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MOE = SIZES | {"moe_intermediate_size": 32}
TEXT = CalibrationSet.of(np.random.default_rng(0).integers(1, 250, (6, 32)), "a text")


def packed(index: ModelIndex, plan: Allocation, out: Path, quantizer: str) -> dict[str, torch.Tensor]:
    """Unit -> (rows, cols) float32, kept tensor -> as stored, of `pack`."""
    pack_model(index, plan, out, quantizer=quantizer, calibration=TEXT)
    stored = {k: v for f in out.glob("packed-*.safetensors") for k, v in load_file(f).items()}
    found = {}
    for u in index.units:
        fmt = FORMATS[plan.formats[u.key]]
        parts = {n: stored[f"{u.key}.{n}"] for n in packed_tensors(fmt, u.rows, u.cols)}
        found[u.key] = PackedMatrix(fmt, u.rows, u.cols, parts).dequantize()
    return found | {k.name: stored[k.name] for k in index.kept}


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def dense_plan(index: ModelIndex, allocate, *names: str) -> Allocation:
    """Formats by layer; tables, and the first layer's down, stay at 16 bits."""
    formats = {
        u.key: "bf16" if u.layer < 0 or (u.layer, u.role) == (0, "down") else names[u.layer % len(names)]
        for u in index.units
    }
    return allocate(index, formats)


@pytest.mark.parametrize(("family", "quantizer"), [("llama", "gptq"), ("llama", "awq"), ("llama", "mse"), ("qwen3_moe", "gptq")])  # fmt: skip
def test_compressed_tensors(family: str, quantizer: str, tiny_checkpoint, allocate, tmp_path: Path) -> None:
    index = index_model(tiny_checkpoint(family, **(MOE if "moe" in family else SIZES)))
    plan = dense_plan(index, allocate, "int4-g32-sym", "int8-channel-sym")
    if "moe" in family:
        plan = allocate(index, "int4-g32-sym")
    target = TARGETS["vllm"]
    assert target.check(plan, index).status == SERVABLE
    target.write_weights(plan, index, tmp_path / "out", quantizer=quantizer, calibration=TEXT)
    want, got = packed(index, plan, tmp_path / "packed", quantizer), written(tmp_path / "out")
    plain = packed(index, plan, tmp_path / "plain", "rtn")
    assert any(not torch.equal(want[u.key], plain[u.key]) for u in index.units)  # the quantiser did something
    for u in index.units:
        fmt = FORMATS[plan.formats[u.key]]
        if fmt.kind == "float":
            assert torch.equal(got[u.tensor].bfloat16(), want[u.key].bfloat16()), u.key
            continue
        codes = unpack_codes(got[f"{u.key}.weight_packed"], fmt.bits, u.cols)
        assert torch.equal(dequantize(Quantized(codes, got[f"{u.key}.weight_scale"], None, fmt)), want[u.key])
    for k in index.kept:
        assert torch.equal(got[k.name], want[k.name]), k.name
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(want[norm], plain[norm]) == (quantizer != "awq")


@pytest.mark.parametrize(("family", "quantizer"), [("llama", "awq"), ("qwen3_moe", "gptq"), ("qwen3_moe", "awq")])  # fmt: skip
def test_mlx(family: str, quantizer: str, tiny_checkpoint, allocate, tmp_path: Path) -> None:
    """float32 checkpoints: scales and biases are stored as they are. awq's routers are float32 there too."""
    index = index_model(tiny_checkpoint(family, **(MOE if "moe" in family else SIZES)))
    palette, stacks = ["int4-g32", "int3-g32-sym", "int8-g32", "bf16"], {}
    formats = {u.key: stacks.setdefault(mlx_name(u), palette[len(stacks) % 4]) for u in index.units}
    target, plan = TARGETS["mlx"], allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    target.write_weights(plan, index, tmp_path / "out", quantizer=quantizer, calibration=TEXT)
    want, got = packed(index, plan, tmp_path / "packed", quantizer), written(tmp_path / "out")
    for u in index.units:
        fmt, name = FORMATS[formats[u.key]], mlx_name(u)
        mine = {n: got[f"{name}.{n}"] for n in ("weight", "scales", "biases") if f"{name}.{n}" in got}
        if u.expert >= 0:
            mine = {n: t[u.expert] for n, t in mine.items()}
        if fmt.kind == "float":
            assert torch.equal(mine["weight"].bfloat16(), want[u.key].bfloat16()), u.key
            continue
        q = unpack_codes(mine["weight"].view(torch.int32), fmt.bits, u.cols)
        group = torch.arange(u.cols) // fmt.group_size
        values = q.float() * mine["scales"][:, group] + mine["biases"][:, group]
        assert torch.equal(values, want[u.key]), u.key
    for k in index.kept:
        assert torch.equal(got[k.name], want[k.name]), k.name


@pytest.mark.parametrize("quantizer", ["gptq", "awq"])
def test_gguf(quantizer: str, tiny_checkpoint, allocate, tmp_path: Path) -> None:
    """bfloat16, a MoE: GGUF keeps routers and norms in float32, so that awq's fit. q4_1's minimum is a float16."""
    index = index_model(tiny_checkpoint("qwen3_moe", dtype="bfloat16", **MOE))
    palette, stacks = ["int4-g32-sym", "int8-g32-sym", "int4-g32", "mxfp4", "int5-g32-sym"], {}
    formats = {u.key: stacks.setdefault(gguf_name(u), palette[len(stacks) % 5]) for u in index.units}
    plan = allocate(index, formats)
    [file] = TARGETS["llama.cpp"].write_weights(plan, index, tmp_path, quantizer=quantizer, calibration=TEXT)
    want = packed(index, plan, tmp_path / "packed", quantizer)
    read = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for u in index.units:
        t = read[f"{gguf_name(u)}.weight"]
        values = gguf.quants.dequantize(t.data, t.tensor_type)
        values = torch.from_numpy(np.array(values[u.expert] if u.expert >= 0 else values))
        if FORMATS[formats[u.key]].symmetric:
            assert torch.equal(values, want[u.key]), u.key
        else:
            assert (values - want[u.key]).abs().max() <= want[u.key].abs().max() / 500, u.key
    router = read["blk.1.ffn_gate_inp.weight"]
    assert np.array_equal(router.data, want["model.layers.1.mlp.gate.weight"].float().numpy())


def test_rows_of_heads_are_turned_after_rounding(tiny_checkpoint, allocate, tmp_path: Path) -> None:
    index = index_model(tiny_checkpoint("llama", **SIZES))
    plan = allocate(index, "int4-g32-sym")
    [file] = TARGETS["llama.cpp"].write_weights(plan, index, tmp_path, quantizer="gptq", calibration=TEXT)
    want = packed(index, plan, tmp_path / "packed", "gptq")["model.layers.0.self_attn.q_proj"]
    t = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.attn_q.weight")
    assert np.array_equal(gguf.quants.dequantize(t.data, t.tensor_type), _permute(want.numpy(), 4))


def test_what_a_container_cannot_hold_is_refused_and_nothing_is_written(
    tiny_checkpoint, allocate, tmp_path: Path
) -> None:
    index = index_model(tiny_checkpoint("qwen3_moe", dtype="bfloat16", **MOE))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="would change tensors") as caught:
        TARGETS["vllm"].write_weights(allocate(index, "int4-g32-sym"), index, out, quantizer="awq", calibration=TEXT)  # fmt: skip
    assert "mlp.gate.weight" in caught.value.found
    with pytest.raises(UserError, match="gptq does not count where the gguf package rounds by itself"):
        TARGETS["llama.cpp"].write_weights(allocate(index, "int8-g32"), index, out, quantizer="gptq", calibration=TEXT)  # fmt: skip
    for name, fmt in (("vllm", "int4-g32-sym"), ("mlx", "int4-g32"), ("llama.cpp", "int4-g32")):
        with pytest.raises(UserError, match="gptq needs a calibration text"):
            TARGETS[name].write_weights(allocate(index, fmt), index, out, quantizer="gptq")
    assert not out.exists() or not list(out.iterdir())
